// What a teacher held for likely at one timestep, stream by stream.

import { address, count, make, makeTable, percent, plain, scroller, significant } from "./dom.js";

// Returns elements for a timestep; `pick(stream)` is called for a row of the table of streams.
export function candidates(found, stream, rollout, entropyOf, pick) {
  const chosen = found.streams[stream];
  const parts = [];
  if (found.streams.length > 1) parts.push(streams(found, stream, entropyOf, pick));
  if (chosen.candidates) parts.push(bars(chosen, found.streams.length === 1));
  else parts.push(summaries(chosen));
  if (found.pictures.length) parts.push(pictures(found, stream, rollout));
  return parts;
}

// One sentence of a stream, which a screen reader speaks when another one is chosen.
export function inWords(found, stream) {
  const { stream: name, code, candidates: kept, tail_mass: tail } = found.streams[stream];
  const time = found.seconds === null ? "" : ` at ${found.seconds.toFixed(2)} s`;
  const where = `Timestep ${found.timestep}${time}, ${plain(name)}`;
  if (!kept) return `${where}.`;
  const drawn = kept.find(({ id }) => id === code);
  const [first] = kept;
  const likeliest = first.id === code ? "the most probable one"
    : `the most probable one is ${first.id} with ${percent(first.probability)}`;
  const chance = drawn ? ` with ${percent(drawn.probability)}` : ", which is not among the candidates";
  const rest = tail === null ? "tail not stored" : `tail ${percent(tail)}`;
  return `${where}: drew code ${code}${chance}; ${likeliest}; ${rest}.`;
}

function streams(found, stream, entropyOf, pick) {
  const rows = found.streams.map((each, at) => {
    const drawn = each.candidates?.find(({ id }) => id === each.code);
    const chosen = at === stream;
    const choose = make("button", {
      type: "button", "aria-pressed": String(chosen), onclick: () => pick(at),
    }, plain(each.stream));
    return make("tr", { class: chosen ? "chosen" : null },
      make("th", { scope: "row" }, choose),
      make("td", {}, each.code ?? "–"),
      make("td", {}, percent(drawn?.probability)),
      make("td", {}, significant(entropyOf(at))),
      make("td", {}, percent(each.tail_mass)));
  });
  const heads = ["stream", "drawn", "probability", "nats", "tail"];
  return scroller("Streams", makeTable({ id: "streams" }, "Streams", heads, rows));
}

function bars(stream, alone) {
  const branches = ["cond", "uncond"].filter((name) => name in stream.candidates[0]);
  const parts = ["probability", ...branches];
  const most = Math.max(...stream.candidates.flatMap((each) => parts.map((part) => each[part])));
  const bar = (share) => {
    const element = make("span", { "aria-hidden": "true" });
    element.style.width = `${(100 * share) / most}%`;
    return element;
  };
  const rows = stream.candidates.map((each) => {
    const drawn = each.id === stream.code;
    return make("tr", { class: drawn ? "drawn" : null, "data-id": each.id },
      make("th", { scope: "row" }, each.id, drawn ? make("span", { class: "unseen" }, " (drawn)") : null),
      make("td", { class: "bars" }, parts.map((part) => bar(each[part]))),
      parts.map((part) => make("td", {}, percent(each[part]))));
  });
  const guided = branches.length ? "guided" : "probability";
  const heads = ["code", make("span", { class: "unseen" }, "bars"), guided, ...branches];
  const caption = `Candidates of ${plain(stream.stream)}`;
  return make("div", { class: alone ? "one" : null },
    scroller("Candidates", makeTable({ id: "candidates" }, caption, heads, rows)),
    make("ul", { class: "key", "aria-hidden": "true" },
      key("c5", "drawn"), key("c1", branches.length ? "guided" : "candidate"),
      branches.length ? [key("c3", "cond"), key("c2", "uncond")] : null),
    rest(stream));
}

const key = (colour, text) => make("li", { class: colour }, make("span", { class: "dot" }), text);

// What of a stream is not among the bars.
function rest({ left_out: left, tail_mass: tail, level }) {
  const told = [];
  if (left.count) {
    told.push(`${count(left.count, "further candidate")} with ${percent(left.probability)} together`);
  }
  if (tail === null) told.push("shares of stored draws; what was not drawn is not stored");
  else if (tail) told.push(`tail of all other codes ${percent(tail)}`);
  if (level !== undefined) told.push(`greatest logit ${significant(level)}`);
  const text = told.join("; ");
  return text ? make("p", { class: "hint" }, `${text[0].toUpperCase()}${text.slice(1)}.`) : null;
}

function summaries(stream) {
  const names = ["mean", "std", "rms", "least", "most"];
  const rows = Object.entries(stream.summaries).map(([array, values]) =>
    [array, ...names.map((name) => significant(values[name]))]);
  const caption = `Stored values of ${plain(stream.stream)}`;
  return scroller("Stored values", makeTable({ id: "summaries" }, caption, ["array", ...names], rows));
}

function pictures(found, stream, rollout) {
  const { timestep } = found;
  return make("div", { class: "channels" }, found.pictures.map((array) => make("figure", {},
    make("img", {
      src: address("channels.png", { ...rollout, timestep, stream, array }),
      alt: `Channels of ${array} at timestep ${timestep}`,
    }),
    make("figcaption", {}, `${array}, channel by channel`))));
}
