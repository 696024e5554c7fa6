// One quantity of a rollout over timesteps and streams, in which a timestep is chosen.

import { make, makeTable, number, plain, scroller, significant } from "./dom.js";

// Viridis at even steps: lightness rises with the value, for every eye.
const COLOURS = [
  [68, 1, 84], [70, 50, 127], [54, 92, 141], [39, 127, 142], [31, 161, 135], [74, 194, 109],
  [159, 218, 58], [253, 231, 37],
];
const LEAST_ROW_PX = 14;
const MOST_ROW_PX = 44;
const MAP_PX = 190;

function colour(share) {
  const place = Math.max(0, Math.min(1, share)) * (COLOURS.length - 1);
  const below = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[below].map((c, at) => Math.round(c + (place - below) * (COLOURS[below + 1][at] - c)));
}

function paint(canvas, width, height, share) {
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const value = share(x, y);
      const [red, green, blue] = value === null ? [128, 128, 128] : colour(value);
      image.data.set([red, green, blue, 255], 4 * (y * width + x));
    }
  }
  pen.putImageData(image, 0, 0);
}

// `choose(timestep, stream)` is called when a person has chosen; `at` says where that is.
export function heatMap(rollout, streams, timestep_s, choose) {
  const steps = rollout.timesteps;
  const canvas = make("canvas", { "aria-hidden": "true" });
  const cell = make("span", { class: "cell" });
  const heard = make("span", { class: "mark", hidden: true });
  const cells = make("div", {
    class: "cells", role: "slider", tabindex: "0", "aria-label": "Timestep",
    "aria-valuemin": "0", "aria-valuemax": String(steps - 1), "aria-describedby": "map-hint",
  }, canvas, cell, heard);
  const legend = make("canvas", { "aria-hidden": "true" });
  const [least, most, note] = [make("span"), make("span"), make("span")];
  const select = make("select", { "aria-label": "Quantity of the map", onchange: show },
    rollout.quantities.map((quantity, at) => make("option", { value: at }, quantity.title)));
  const height = Math.max(LEAST_ROW_PX, Math.min(MOST_ROW_PX, MAP_PX / streams.length)) * streams.length;
  canvas.style.height = `${height}px`;
  paint(legend, 64, 1, (x) => x / 63);
  let at = { timestep: 0, stream: 0 };

  const quantity = () => rollout.quantities[Number(select.value)];

  function show() {
    const values = quantity().values;
    const known = values.flat().filter((value) => value !== null);
    const [low, high] = [Math.min(0, least_of(known)), most_of(known)];
    paint(canvas, steps, streams.length, (x, y) =>
      values[y][x] === null ? null : (values[y][x] - low) / (high - low || 1));
    least.textContent = significant(low);
    most.textContent = `${significant(high)} ${quantity().unit}`.trim();
    note.textContent = quantity().note ? `What is shown is ${quantity().note}.` : "";
    mark();
  }

  function mark() {
    cell.style.left = `${(100 * at.timestep) / steps}%`;
    cell.style.width = `${100 / steps}%`;
    cell.style.top = `${(100 * at.stream) / streams.length}%`;
    cell.style.height = `${100 / streams.length}%`;
    const value = quantity().values[at.stream][at.timestep];
    const time = timestep_s === null ? "" : `, ${(at.timestep * timestep_s).toFixed(2)} s`;
    const stream = streams.length > 1 ? `, ${plain(streams[at.stream].name)}` : "";
    cells.setAttribute("aria-valuenow", String(at.timestep));
    const { title, unit } = quantity();
    const where = `timestep ${at.timestep} of ${steps}${time}${stream}`;
    cells.setAttribute("aria-valuetext", `${where}: ${title} ${significant(value)} ${unit}`.trim());
  }

  function go(timestep, stream) {
    const next = {
      timestep: Math.max(0, Math.min(steps - 1, timestep)),
      stream: Math.max(0, Math.min(streams.length - 1, stream)),
    };
    if (next.timestep === at.timestep && next.stream === at.stream) return;
    place(next.timestep, next.stream);
    choose(at.timestep, at.stream);
  }

  function place(timestep, stream) {
    at = { timestep, stream };
    mark();
  }

  const moves = {
    ArrowLeft: () => go(at.timestep - 1, at.stream), ArrowRight: () => go(at.timestep + 1, at.stream),
    ArrowUp: () => go(at.timestep, at.stream - 1), ArrowDown: () => go(at.timestep, at.stream + 1),
    PageUp: () => go(at.timestep - 10, at.stream), PageDown: () => go(at.timestep + 10, at.stream),
    Home: () => go(0, at.stream), End: () => go(steps - 1, at.stream),
  };
  cells.addEventListener("keydown", (event) => {
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    moves[event.key]();
  });
  cells.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    go(Math.floor(((event.clientX - box.left) / box.width) * steps),
      Math.floor(((event.clientY - box.top) / box.height) * streams.length));
  });

  const end = timestep_s === null ? `${number(steps)} steps` : `${(steps * timestep_s).toFixed(2)} s`;
  const rows = streams.length > 1
    ? `Rows are the streams, ${plain(streams[0].name)} on top, ${plain(streams.at(-1).name)} below; `
    : "";
  const box = make("div", { class: "map" },
    make("div", { class: "bar-of-map" }, make("div", {}, make("h3", {}, "Over time"), select),
      make("span", { class: "scale" }, least, legend, most)),
    cells,
    make("div", { class: "axis", "aria-hidden": "true" }, make("span", {}, "0"), make("span", {}, end)),
    make("p", { class: "hint", id: "map-hint" },
      `${rows}columns are the timesteps. Click, or use the arrow keys, to look into one. `, note),
    table());

  // The same numbers for who cannot see the map; made when opened, for it may be long.
  function table() {
    const holder = scroller("The map as a table");
    const details = make("details", {}, make("summary", {}, "The map as a table"), holder);
    details.addEventListener("toggle", fill);
    select.addEventListener("change", fill);
    function fill() {
      if (!details.open) return;
      const { title, unit, values } = quantity();
      const rows = Array.from({ length: steps }, (_, t) =>
        [t, ...values.map((row) => significant(row[t]))]);
      const heads = ["timestep", ...streams.map((stream) => plain(stream.name))];
      holder.replaceChildren(makeTable({}, unit ? `${title} in ${unit}` : title, heads, rows));
    }
    return details;
  }

  show();
  return {
    box, cells, place,
    at: () => at,
    hear(time) {
      heard.hidden = timestep_s === null;
      heard.style.left = `${Math.min(100, (100 * time) / (steps * (timestep_s ?? 1)))}%`;
    },
    summary: (timestep, stream, title) => {
      const found = rollout.quantities.find((each) => each.title === title);
      return found ? found.values[stream][timestep] : null;
    },
  };
}

const least_of = (values) => values.reduce((least, value) => Math.min(least, value), Infinity);
const most_of = (values) => values.reduce((most, value) => Math.max(most, value), -Infinity);

