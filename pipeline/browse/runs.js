// A run: what its evaluation measured, and its systems side by side.

import { address, ask, byId, count, make, news, plain } from "./dom.js";
import { player } from "./player.js";
import { training } from "./training.js";

const SWITCHING = "The keys 1 to 9 switch between the clips of the sentence that was played last: "
  + "the next one goes on where the other stopped.";

let players = [];
let sentences = []; // the players of each
let shown = null; // the run on the page: its number, which report, and its training

export async function showRun(run) {
  hideRun();
  const found = await ask("api/run", { run });
  const logs = training(run);
  shown = { run, report: found.report, logs };
  byId("run").replaceChildren(
    make("div", { class: "run-head" },
      make("h2", {}, found.evaluated ? `Evaluation of ${plain(found.run)}` : plain(found.name)),
      found.evaluated ? make("p", {}, sizes(found)) : null,
      found.has_page ? make("a", {
        href: address("report", { run }), target: "_blank", rel: "noopener",
      }, "Open the report") : null),
    make("div", { class: "run-body" }, ...(found.evaluated ? body(run, found)
      : [make("p", { class: "card" }, "This run has no report yet: run `foretell evaluate` first.")]), logs.box));
  await logs.renew();
}

// Take in what is new of the run that is shown; a report that a person reads stays until they ask.
export async function renewRun(runs) {
  if (!shown) return;
  const { run, report, logs } = shown;
  const now = runs.find((each) => each.run === run)?.report ?? null;
  if (now !== report && !report) {
    await showRun(run);
    return;
  }
  news(byId("run-news"), now === report ? "" : "There is another report of this run by now.",
    "Show it", () => showRun(run));
  await logs.renew();
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
  [players, sentences, shown] = [[], [], null];
  news(byId("run-news"), "");
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

// Metrics down, in groups, and systems across. Each cell names its system, for a phone stacks the
// cells of a row; the roles are there because some browsers forget them where it does.
function systems(found) {
  const width = found.systems.length + 1;
  const groups = new Map();
  found.metrics.forEach((metric, at) => {
    if (!groups.has(metric.group)) groups.set(metric.group, []);
    groups.get(metric.group).push(make("tr", { role: "row" },
      make("th", { scope: "row", role: "rowheader" }, metric.title, make("small", {}, metric.hint)),
      found.systems.map((system) => value(system, system.values[at]))));
  });
  const heads = found.systems.map(({ label, colour }) => make("th",
    { scope: "col", role: "columnheader", class: `c${colour}` }, make("span", { class: "dot" }), plain(label)));
  const table = make("table", { class: "systems", role: "table" },
    make("caption", {}, "Systems"),
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" },
      make("th", { scope: "col", role: "columnheader" }, "metric"), heads)),
    [...groups].map(([group, rows]) => make("tbody", { role: "rowgroup" },
      make("tr", { class: "group", role: "row" },
        make("th", { scope: "rowgroup", role: "rowheader", colspan: width }, group)), rows)));
  return make("section", { class: "card", "aria-label": "Systems" },
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Metrics of the systems" }, table),
    make("p", { class: "hint" }, "The small numbers are 95\u00a0% intervals."));
}

const value = ({ label, colour }, found) => make("td",
  { role: "cell", "data-of": plain(label), class: found === null ? `absent c${colour}` : `c${colour}` },
  found === null ? "–" : found.value,
  found?.interval ? make("small", {}, found.interval.join(" … ")) : null);

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
