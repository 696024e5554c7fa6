// What a teacher held for likely at one timestep, stream by stream.

import { address, count, make, percent, plain, significant } from "./dom.js";

// Returns elements for a timestep; `pick(stream)` is called for a row of the table of streams.
export function candidates(found, stream, key, entropyOf, pick) {
  const chosen = found.streams[stream];
  const parts = [];
  if (found.streams.length > 1) parts.push(streams(found, stream, entropyOf, pick));
  if (chosen.candidates) parts.push(bars(chosen, found.streams.length === 1));
  else parts.push(summaries(chosen));
  if (found.pictures.length) parts.push(pictures(found, stream, key));
  return parts;
}

// One sentence of a stream, which a screen reader speaks when another one is chosen.
export function inWords(found, stream) {
  const { stream: name, code, candidates: kept, tail_mass: tail } = found.streams[stream];
  const time = found.seconds === null ? "" : ` at ${found.seconds.toFixed(2)} s`;
  const where = `Timestep ${found.timestep}${time}, ${plain(name)}`;
  if (!kept) return `${where}.`;
  const drawn = kept.find(({ id }) => id === code);
  const likeliest = kept[0].id === code ? "the most probable one" : `the most probable one is ${kept[0].id} with ${percent(kept[0].probability)}`;
  const chance = drawn ? ` with ${percent(drawn.probability)}` : ", which is not among the candidates";
  const rest = tail === null ? "tail not stored" : `tail ${percent(tail)}`;
  return `${where}: drew code ${code}${chance}; ${likeliest}; ${rest}.`;
}

function streams(found, stream, entropyOf, pick) {
  const rows = found.streams.map((each, at) => {
    const drawn = each.candidates?.find(({ id }) => id === each.code);
    return make("tr", { class: at === stream ? "chosen" : null },
      make("th", { scope: "row" },
        make("button", { type: "button", "aria-pressed": String(at === stream), onclick: () => pick(at) }, plain(each.stream))),
      make("td", {}, each.code ?? "–"),
      make("td", {}, percent(drawn?.probability)),
      make("td", {}, significant(entropyOf(at))),
      make("td", {}, percent(each.tail_mass)));
  });
  const heads = ["stream", "drawn", "probability", "nats", "tail"];
  return make("div", { class: "tall scroll", tabindex: "0", role: "region", "aria-label": "Streams" }, make("table", { id: "streams" },
    make("caption", {}, "Streams"),
    make("thead", {}, make("tr", {}, heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, rows)));
}

function bars(stream, alone) {
  const branches = ["cond", "uncond"].filter((name) => name in stream.candidates[0]);
  const most = Math.max(...stream.candidates.flatMap((each) => [each.probability, ...branches.map((b) => each[b])]));
  const bar = (share) => {
    const element = make("span");
    element.style.width = `${(100 * share) / most}%`;
    return element;
  };
  const rows = stream.candidates.map((each) => {
    const drawn = each.id === stream.code;
    return make("tr", { class: drawn ? "drawn" : null, "data-id": each.id },
      make("th", { scope: "row" }, each.id, drawn ? make("span", { class: "unseen" }, " (drawn)") : null),
      make("td", { class: "bars", "aria-hidden": "true" }, bar(each.probability), branches.map((b) => bar(each[b]))),
      make("td", {}, percent(each.probability)),
      branches.map((b) => make("td", {}, percent(each[b]))));
  });
  const heads = [["code", ""], ["", "bars"], [branches.length ? "guided" : "probability", ""], ...branches.map((b) => [b, ""])];
  const left = stream.left_out;
  const told = [
    left.count ? `${count(left.count, "further candidate")} with ${percent(left.probability)} together` : null,
    stream.tail_mass === null ? "shares of stored draws; what was not drawn is not stored"
      : stream.tail_mass ? `tail of all other codes ${percent(stream.tail_mass)}` : null,
    stream.level === undefined ? null : `greatest logit ${significant(stream.level)}`,
  ].filter(Boolean).join("; ");
  return make("div", { class: alone ? "one" : null },
    make("div", { class: "tall scroll", tabindex: "0", role: "region", "aria-label": "Candidates" }, make("table", { id: "candidates" },
      make("caption", {}, `Candidates of ${plain(stream.stream)}`),
      make("thead", {}, make("tr", {}, heads.map(([head, name]) =>
        make(head ? "th" : "td", { scope: head ? "col" : null, class: name || null, "aria-hidden": head ? null : "true" }, head)))),
      make("tbody", {}, rows))),
    make("ul", { class: "key", "aria-hidden": "true" },
      key("c5", "drawn"), key("c1", branches.length ? "guided" : "candidate"),
      branches.length ? [key("c3", "cond"), key("c2", "uncond")] : null),
    told ? make("p", { class: "hint" }, `${told[0].toUpperCase()}${told.slice(1)}.`) : null);
}

const key = (colour, text) => make("li", { class: colour }, make("span", { class: "dot" }), text);

function summaries(stream) {
  const names = ["mean", "std", "rms", "least", "most"];
  return make("div", { class: "scroll" }, make("table", { id: "summaries" },
    make("caption", {}, `Stored values of ${plain(stream.stream)}`),
    make("thead", {}, make("tr", {}, ["array", ...names].map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, Object.entries(stream.summaries).map(([array, values]) => make("tr", {},
      make("th", { scope: "row" }, array), names.map((name) => make("td", {}, significant(values[name]))))))));
}

function pictures(found, stream, key_) {
  return make("div", { class: "channels" }, found.pictures.map((array) => make("figure", {},
    make("img", {
      src: address("channels.png", { ...key_, timestep: found.timestep, stream, array }),
      alt: `Channels of ${array} at timestep ${found.timestep}`,
    }),
    make("figcaption", {}, `${array}, channel by channel`))));
}
