// A run: what its evaluation measured, and its systems side by side.

import { address, ask, byId, count, make, makeTable, plain, scroller } from "./dom.js";
import { player } from "./player.js";

const SWITCHING = "The keys 1 to 9 switch between the clips of the sentence that was played last: "
  + "the next one goes on where the other stopped.";

let players = [];
let sentences = []; // the players of each

export async function showRun(run) {
  hideRun();
  const found = await ask("api/run", { run });
  byId("run").replaceChildren(
    make("div", { class: "run-head" },
      make("h2", {}, `Evaluation of ${plain(found.run ?? found.name)}`),
      found.evaluated ? make("p", {}, sizes(found)) : null,
      found.has_page ? make("a", {
        href: address("report", { run }), target: "_blank", rel: "noopener",
      }, "Open the report") : null),
    make("div", { class: "run-body" }, ...(found.evaluated ? body(run, found)
      : [make("p", { class: "card" }, "This run has no report yet: run `foretell evaluate` first.")])));
}

const sizes = ({ samples, sentences }) =>
  `${count(samples, "held-out sample")}, ${count(sentences, "different condition")}`;

let last = null; // the clip that was played last

document.addEventListener("play", (event) => { last = event.target; }, true);
document.addEventListener("keydown", (event) => {
  const clips = sentences.find((made) => made.some(({ audio }) => audio === last)) ?? sentences[0];
  const next = /^[1-9]$/.test(event.key) ? clips?.[Number(event.key) - 1] : undefined;
  if (!next || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const time = last?.isConnected && !last.ended ? last.currentTime : 0;
  if (next.audio !== last) next.seek(time);
  next.audio.play();
});

export function hideRun() {
  players.forEach((each) => each.release());
  [players, sentences] = [[], []];
}

function body(run, found) {
  const looks = Object.fromEntries(found.systems.map((system) => [system.name, system]));
  const parts = [];
  if (found.warnings.length) {
    const items = found.warnings.map((warning) => make("li", {}, plain(warning)));
    parts.push(make("ul", { class: "notice" }, items));
  }
  if (found.metrics.length) parts.push(systems(found));
  if (found.audio.length) {
    parts.push(make("p", { class: "hint" }, SWITCHING));
  }
  parts.push(...found.audio.map((sample, item) => sentence(run, sample, item, looks)));
  parts.push(...found.images.map((sample, item) => drawn(run, sample, item, looks)));
  return parts;
}

function systems(found) {
  const heads = ["system", ...found.metrics.map(({ title, hint }) => make("span", { title: hint }, title))];
  const cell = (value) => value === null ? make("td", {}, "–")
    : make("td", {}, value.value, value.interval ? make("small", {}, value.interval.join(" – ")) : null);
  const rows = found.systems.map(({ label, colour, values }) => make("tr", { class: `c${colour}` },
    make("th", { scope: "row" }, make("span", { class: "dot" }), plain(label)), values.map(cell)));
  return make("section", { class: "card", "aria-label": "Systems" },
    scroller("Metrics of the systems", makeTable({ class: "systems" }, "Systems", heads, rows)),
    make("p", { class: "hint" }, "Below a value: its 95 % interval."));
}

function sentence(run, sample, item, looks) {
  const made = sample.clips.map((clip) => {
    const { label, colour } = looks[clip.system];
    return player(plain(label), { run, item, system: clip.system }, { colour, details: heardIn(clip) });
  });
  players.push(...made);
  sentences.push(made);
  return make("section", { class: "card", "aria-labelledby": `item-${item}` },
    make("h3", { id: `item-${item}` }, plain(sample.text)),
    make("p", { class: "id" }, [sample.sample_id, sample.speaker].filter(Boolean).map(plain).join(" · ")),
    make("div", { class: "clips" }, made.map(({ box }) => box)));
}

function heardIn({ heard, edits }) {
  if (heard === null) return null;
  return make("p", {}, heard ? make("q", {}, plain(heard)) : "nothing heard", errors(edits));
}

const errors = (edits) => edits === null ? "" : ` · ${edits ? count(edits, "error") : "no error"}`;

function drawn(run, sample, item, looks) {
  return make("section", { class: "card", "aria-labelledby": `image-${item}` },
    make("h3", { id: `image-${item}` }, plain(sample.text || sample.sample_id)),
    make("p", { class: "id" }, plain(sample.sample_id)),
    make("div", { class: "pictures" }, sample.systems.map((system) => make("figure", {},
      make("img", {
        src: address("picture.png", { run, item, system }), loading: "lazy",
        alt: `${labelOf(system, looks)}: ${plain(sample.text)}`,
      }),
      make("figcaption", {}, labelOf(system, looks))))));
}

const labelOf = (system, looks) => plain(looks[system]?.label ?? system);
