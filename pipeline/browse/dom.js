// Elements made of text: nothing that comes from a store is ever read as HTML.

// Control characters and what turns the direction of writing could make one id look like another.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;

export const byId = (id) => document.getElementById(id);

export const plain = (text) =>
  String(text).replace(UNSEEN, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);

export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  set(element, attributes);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function makeSvg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  set(element, attributes);
  element.append(...children);
  return element;
}

// A table whose first column names its rows: each is a list of cells, or a ready row.
export function makeTable(attributes, caption, heads, rows) {
  const asRow = (row) => Array.isArray(row)
    ? make("tr", {}, make("th", { scope: "row" }, row[0]), row.slice(1).map((cell) => make("td", {}, cell)))
    : row;
  return make("table", attributes,
    make("caption", {}, caption),
    make("thead", {}, make("tr", {}, heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, rows.map(asRow)));
}

// What is longer or wider than its place; it can be reached by keyboard, and so moved.
export const scroller = (label, ...children) =>
  make("div", { class: "tall scroll", tabindex: "0", role: "region", "aria-label": label }, ...children);

function set(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
}

export function tell(message) {
  byId("notice").textContent = message;
  byId("notice").hidden = !message;
}

// Say what is new, with a button that shows it; an empty message takes both away.
export function news(box, message, button, show) {
  if (box.firstChild?.textContent === message) return;
  box.replaceChildren(...(message ? [make("span", {}, message), make("button", {
    type: "button", onclick: () => attempt(show),
  }, button)] : []));
}

export const address = (path, parameters) => `${path}?${new URLSearchParams(parameters)}`;

// Value of an address of the server; what it refuses is thrown in its words.
export async function ask(path, parameters = {}) {
  const answer = await fetch(address(path, parameters)).catch(() => {
    throw new Error("The server does not answer: is `foretell inspect serve` still running?");
  });
  const isJson = (answer.headers.get("content-type") ?? "").includes("json");
  if (!answer.ok) {
    throw new Error(isJson ? (await answer.json()).error : (await answer.text()).trim());
  }
  return answer.json();
}

// Does what may fail, and tells a person when it does.
export async function attempt(work) {
  try {
    await work();
  } catch (error) {
    tell(error.message);
  }
}

export const number = (value) => value.toLocaleString("en");

export const count = (value, one, many = `${one}s`) => `${number(value)} ${value === 1 ? one : many}`;

export function significant(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-4) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

export function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = 100 * share;
  if (value === 0) return "0\u00a0%";
  if (value < 0.01) return "<\u00a00.01\u00a0%";
  return `${value.toFixed(value >= 10 ? 1 : 2)}\u00a0%`;
}

export function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(2)}\u00a0s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${(seconds / 3600).toFixed(1)} h`;
}
