// Training of the models of a run: loss curves as far as the logs go by now.

import { ask, make, makeSvg, makeTable, number, plain, significant } from "./dom.js";

const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [340, 180, 62, 8, 8, 34];
const FIRST_COLOUR = 3; // as in a report
const DASHES = ["1 3", "6 2", "2 2", "none", "7 2 1 2", "4 1 1 1 1 1"];
const WHEN = { dateStyle: "medium", timeStyle: "short" };
const LOG_SPAN = 12; // ratio of values from which the axis is logarithmic

// A section that is empty until `renew` finds logs; it draws again only what has changed.
export function training(run) {
  const box = make("section", { class: "card", "aria-label": "Training", hidden: true });
  let drawn = "";
  async function renew() {
    const logs = await ask("api/training", { run });
    const said = JSON.stringify(logs);
    if (said === drawn) return;
    drawn = said;
    const open = new Set([...box.querySelectorAll("details[open]")].map(({ dataset }) => dataset.of));
    box.hidden = !logs.length;
    box.replaceChildren(make("h3", {}, "Training"),
      make("div", { class: "curves" }, logs.map((log) => card(log, open.has(log.name)))));
  }
  return { box, renew };
}

function card(log, isOpen) {
  const terms = log.losses.map((term, at) => ({ ...term, colour: (FIRST_COLOUR + at) % DASHES.length }));
  const told = log.step === null ? "no step yet"
    : `step ${number(log.step)}, ${new Date(1000 * log.written_s).toLocaleString("en-GB", WHEN)}`;
  return make("figure", {},
    make("figcaption", {}, make("h4", {}, plain(log.label)), make("span", { class: "length" }, told)),
    terms.length ? [chart(log, terms), legend(terms), numbers(log, terms, isOpen)]
      : make("p", { class: "hint" }, "The log holds no losses yet."));
}

function chart(log, terms) {
  const values = terms.flatMap((term) => term.values);
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const isLog = least > 0 && most / least > LOG_SPAN;
  const scale = isLog ? Math.log : (value) => value;
  const back = isLog ? Math.exp : (value) => value;
  const low = isLog ? scale(least) : Math.min(0, least);
  const high = scale(most) > low ? scale(most) : low + 1;
  const last = Math.max(1, ...terms.map(({ steps }) => steps.at(-1)));
  const x = (step) => LEFT + (step / last) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const marks = [0, 0.5, 1].map((share) => low + share * (high - low));
  const text = (attributes, words) => makeSvg("text", attributes, words);
  const base = HEIGHT - BOTTOM + 14;
  return makeSvg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "curve",
    "aria-label": `Loss curves of ${plain(log.label)}: ${terms.map(inWords).join("; ")}`,
  },
  ...marks.map((at) => makeSvg("path", { class: "rule", d: `M${LEFT} ${y(at)}H${WIDTH - RIGHT}` })),
  ...marks.map((at) => text({ x: LEFT - 6, y: y(at) + 4, "text-anchor": "end" }, significant(back(at)))),
  text({ x: LEFT, y: base }, "0"),
  text({ x: WIDTH - RIGHT, y: base, "text-anchor": "end" }, number(last)),
  text({ x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, "optimizer step"),
  ...terms.map(({ steps, values: of, colour }) => makeSvg("path", {
    class: `line c${colour}`, "stroke-dasharray": DASHES[colour],
    d: `M${of.map((value, at) => `${x(steps[at]).toFixed(1)} ${y(scale(value)).toFixed(1)}`).join("L")}`,
  })));
}

const inWords = ({ name, steps, values }) =>
  `${plain(name)} from ${significant(values[0])} at step ${steps[0]} to ${significant(values.at(-1))} `
  + `at step ${steps.at(-1)}`;

const legend = (terms) => make("ul", { class: "key" }, terms.map(({ name, values, colour }) => make("li", {},
  makeSvg("svg", { viewBox: "0 0 26 8", width: 26, height: 8, "aria-hidden": "true" },
    makeSvg("path", { class: `line c${colour}`, "stroke-dasharray": DASHES[colour], d: "M0 4H26" })),
  `${plain(name)} ${significant(values.at(-1))}`)));

function numbers(log, terms, isOpen) {
  const rows = terms.map(({ name, steps, values }) => [
    plain(name), number(steps[0]), significant(values[0]), number(steps.at(-1)), significant(values.at(-1)),
  ]);
  const heads = ["term", "first step", "value there", "last step", "value there"];
  return make("details", { "data-of": log.name, open: isOpen },
    make("summary", {}, "Numbers", make("span", { class: "unseen" }, `: ${plain(log.label)}`)),
    make("div", { class: "scroll" }, makeTable({}, `Losses of ${plain(log.label)}`, heads, rows)));
}
