// One rollout: what it is, what it sounds like, its map, and a timestep of it.

import {
  ask, attempt, byId, duration, make, makeTable, plain, scroller, significant, tell,
} from "./dom.js";
import { candidates, inWords } from "./candidates.js";
import { heatMap } from "./heat_map.js";
import { player } from "./player.js";

let shown = null; // what is on the page: key, its document, its map and players
let asked = 0; // how often a timestep was asked for: only the last answer counts

export const keyOf = (sample, variation, timestep = null) => new URLSearchParams({
  view: "store", sample, variation, ...(timestep === null ? {} : { timestep }),
}).toString();

// Show a rollout and a timestep of it; `store` is the overview.
export async function showRollout(store, sample, variation, timestep, stream) {
  const key = { sample, variation };
  if (shown?.key.sample !== sample || shown?.key.variation !== variation) {
    const mine = ++asked;
    const found = await ask("api/rollout", key);
    if (mine !== asked) return;
    draw(store, key, found);
  }
  await showTimestep(Math.min(timestep, shown.found.timesteps - 1), stream ?? shown.map.at().stream);
}

export function hideRollout(message) {
  shown?.players.forEach((each) => each.release());
  shown = null;
  byId("rollout").replaceChildren(make("section", {}, make("h2", { id: "sample" }, message)));
}

function draw(store, key, found) {
  shown?.players.forEach((each) => each.release());
  const map = heatMap(found, store.streams, store.timestep_s, (timestep, stream) => attempt(async () => {
    history.replaceState(null, "", `#${keyOf(key.sample, key.variation, timestep)}`);
    for (const each of shown.players) if (each.audio.paused) each.seek(timestep * store.timestep_s);
    await showTimestep(timestep, stream);
  }));
  const players = store.silence ? [] : clips(store, key, map);
  shown = { key, found, map, players, store };
  byId("rollout").replaceChildren(...[
    head(store, found),
    store.timestep_s === null ? null : heard(store, players),
    make("section", { "aria-label": "Over time" }, map.box),
    make("section", { "aria-labelledby": "at" },
      make("div", { class: "bar-of-map" },
        make("h3", { id: "at" }),
        make("div", { class: "walk" },
          make("button", { type: "button", onclick: () => step(-1) }, "Previous timestep"),
          make("button", { type: "button", onclick: () => step(1) }, "Next timestep"))),
      make("p", { class: "unseen", role: "status", id: "told" }),
      make("div", { class: "step", id: "step" })),
    columns(found),
  ].filter(Boolean));
}

function step(by) {
  const { timestep } = shown.map.at();
  const next = Math.max(0, Math.min(shown.found.timesteps - 1, timestep + by));
  location.replace(`#${keyOf(shown.key.sample, shown.key.variation, next)}`);
}

function head(store, found) {
  const facts = {
    timesteps: found.timesteps,
    ...(found.seconds === null ? {} : { duration: duration(found.seconds) }),
    ...(store.has_entropy ? { "stop reason": found.stop_reason } : {}),
    weight: significant(found.weight),
    seed: found.seed,
    ...found.drawn,
  };
  const texts = Object.entries(found.conditions);
  const first = texts.find(([name]) => name === store.main_text);
  const others = texts.filter((each) => each !== first);
  return make("section", { class: "head" },
    make("h2", { id: "sample", tabindex: "-1" }, plain(found.sample_id)),
    first ? make("p", { class: "said" }, plain(first[1])) : null,
    make("dl", { class: "small" }, [...Object.entries(facts), ...others].map(([name, value]) =>
      make("div", {}, make("dt", {}, plain(name)), make("dd", {}, plain(value))))),
    found.variations.length > 1 ? variations(found) : null);
}

function variations(found) {
  return make("nav", { class: "variations", "aria-label": "Variations" }, "Variation",
    found.variations.map((each) => make("a", {
      href: `#${keyOf(found.sample_id, each)}`,
      "aria-current": each === found.variation ? "true" : null,
    }, each)));
}

const OF_SOURCE = {
  teacher: "Rollout of the teacher", student: "Rollout of a student",
  dataset: "The recording's codes", replay: "Codes of the replayed store",
};

function clips(store, key, map) {
  const made = [player(OF_SOURCE[store.source], key, { hear: map.hear })];
  if (store.recordings && store.source !== "dataset") {
    made.push(player("The recording, through the audio codec", { ...key, recording: "1" }, { colour: 0 }));
  }
  return made;
}

function heard(store, players) {
  return make("section", { "aria-labelledby": "listen", class: players.length === 1 ? "whole" : null },
    make("h3", { id: "listen" }, "Listen"),
    store.silence ? make("p", { class: "hint" }, `Nothing can be heard: ${plain(store.silence)}`)
      : make("div", { class: "clips" }, players.map(({ box }) => box)));
}

// Numbers of every timestep beside the predictions, such as a noise level.
function columns(found) {
  const names = Object.keys(found.columns);
  if (!names.length) return null;
  const rows = Array.from({ length: found.timesteps }, (_, t) =>
    [t, ...names.map((name) => significant(found.columns[name][t]))]);
  const table = makeTable({}, "Beside the predictions", ["timestep", ...names.map(plain)], rows);
  return make("section", { "aria-label": "Columns" }, scroller("Columns", table));
}

async function showTimestep(timestep, stream) {
  const { key, map } = shown;
  map.place(timestep, stream);
  const mine = ++asked;
  const found = await ask("api/timestep", { ...key, timestep });
  if (mine !== asked || shown?.key !== key) return;
  tell("");
  show(found, stream);
}

function show(found, stream) {
  const { key, map } = shown;
  const time = found.seconds === null ? "" : ` at ${found.seconds.toFixed(2)} s`;
  byId("at").textContent = `Timestep ${found.timestep}${time}`;
  byId("told").textContent = inWords(found, stream);
  byId("step").replaceChildren(...candidates(found, stream, key,
    (at) => map.summary(found.timestep, at, "entropy"),
    (at) => {
      map.place(found.timestep, at);
      show(found, at);
      byId("streams").querySelectorAll("button")[at].focus({ preventScroll: true });
    }));
  const row = document.querySelector("#streams tr.chosen");
  const box = row?.closest(".tall");
  if (box) box.scrollTop = row.offsetTop - (box.clientHeight - row.offsetHeight) / 2;
}
