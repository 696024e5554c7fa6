// The page: which view the address asks for, and what is in it.

import { ask, attempt, byId, duration, make, number, plain, tell } from "./dom.js";
import { find, markCurrent, prepareFinder, renewFinder } from "./finder.js";
import { hideRollout, showRollout } from "./rollout.js";
import { hideRun, renewRun, showRun } from "./runs.js";

const LOOK_MS = 5000; // between two looks at what is new
let shown = null; // the overview
let view = null; // what the page shows by now
let run = null;
let looking = false;

const asked = () => new URLSearchParams(location.hash.slice(1));

async function start() {
  shown = await ask("api/overview");
  const { store, runs } = shown;
  views(shown);
  byId("title").textContent = plain(runs.length ? runs[0].name : store.path.split("/").at(-1));
  document.title = `${byId("title").textContent} · foretell`;
  if (store) {
    byId("path").textContent = plain(store.path);
    facts(store);
    prepareFinder(store);
  }
  addEventListener("hashchange", () => attempt(follow));
  await follow();
  setInterval(look, LOOK_MS);
  document.addEventListener("visibilitychange", look);
}

function views({ store, runs }) {
  byId("views").replaceChildren(...[
    ...(store ? [["Store", "view=store"]] : []),
    ...runs.map(({ run: at, name }) => [runs.length === 1 ? "Run" : `Run ${plain(name)}`, `view=run&run=${at}`]),
  ].map(([title, hash]) => make("a", { href: `#${hash}`, "data-hash": hash }, title)));
}

// Take in what was written since. When the server does not answer, what a person asks next says so.
async function look() {
  if (document.hidden || looking) return;
  looking = true;
  try {
    const found = await ask("api/overview");
    const before = shown;
    shown = found;
    if (String(before.runs.map(({ run: at }) => at)) !== String(found.runs.map(({ run: at }) => at))) {
      views(found);
      markView();
    }
    if (JSON.stringify(before.store) !== JSON.stringify(found.store)) facts(found.store);
    if (view === "store") await renewStore();
    else await renewRun(found.runs);
  } catch {
    // There is another look soon.
  } finally {
    looking = false;
  }
}

async function renewStore() {
  const wasEmpty = !byId("rollouts").children.length;
  await renewFinder(shown.store);
  if (wasEmpty && asked().get("sample") === null) await showAsked(asked());
}

function facts(store) {
  const sizes = new Set(store.streams.map((stream) => stream.vocabulary ?? stream.shape.join(" × ")));
  const target = store.target.kind === "top_k" ? `top ${store.target.k}` : store.target.kind;
  const [there, planned] = [store.shards, store.planned_shards].map(number);
  const told = {
    Family: store.family,
    Target: store.target.branches === "both" ? `${target}, both branches` : target,
    Guidance: `× ${store.cfg_scale}`,
    Streams: `${store.streams.length} × ${[...sizes].join(", ")}`,
    Samples: number(store.samples),
    Rollouts: number(store.rollouts),
    Timesteps: number(store.timesteps),
    ...(store.audio_s === null ? {} : { Audio: duration(store.audio_s) }),
    Shards: there === planned ? there : `${there} of ${planned}`,
  };
  byId("facts").replaceChildren(...Object.entries(told).map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, plain(value)))));
  const wrong = [...store.damaged, ...(store.trouble ? [`What is new cannot be seen: ${store.trouble}`] : [])];
  byId("damaged").replaceChildren(...wrong.map((reason) => make("li", {}, plain(reason))));
  byId("damaged").hidden = !wrong.length;
}

// Show what the address behind # asks for.
async function follow() {
  if (location.hash === "#main") return; // the skip link
  tell("");
  const wanted = asked();
  const next = wanted.get("view") ?? (shown.store ? "store" : "run");
  const nextRun = next === "run" ? Number(wanted.get("run") ?? shown.runs[0]?.run ?? 0) : null;
  byId("store").hidden = next !== "store";
  byId("run").hidden = next !== "run";
  const changed = next !== view || nextRun !== run;
  const first = next === "store" && view !== "store";
  [view, run] = [next, nextRun];
  markView();
  if (next === "run") {
    if (changed) {
      hideRollout("");
      await showRun(nextRun);
    }
    return;
  }
  hideRun();
  if (first) await find(0);
  await showAsked(wanted);
}

function markView() {
  const own = view === "run" ? `view=run&run=${run}` : "view=store";
  for (const link of byId("views").children) {
    if (link.dataset.hash === own) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

async function showAsked(wanted) {
  const sample = wanted.get("sample");
  if (sample === null) {
    const link = byId("rollouts").querySelector("a");
    if (link) location.replace(link.getAttribute("href"));
    else hideRollout("No rollout is there yet");
    return;
  }
  markCurrent();
  const timestep = Number(wanted.get("timestep") ?? 0);
  await showRollout(shown.store, sample, wanted.get("variation") ?? "0", timestep);
}

attempt(start);
