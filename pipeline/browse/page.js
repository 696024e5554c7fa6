// The page: which view the address asks for, and what is in it.

import { ask, attempt, byId, duration, make, number, plain, tell } from "./dom.js";
import { find, markCurrent, prepareFinder } from "./finder.js";
import { hideRollout, showRollout } from "./rollout.js";
import { hideRun, showRun } from "./runs.js";

let shown = null; // the overview
let view = null; // what the page shows by now
let run = null;

const asked = () => new URLSearchParams(location.hash.slice(1));

async function start() {
  shown = await ask("api/overview");
  const { store, runs } = shown;
  byId("views").replaceChildren(...[
    ...(store ? [["Store", "view=store"]] : []),
    ...runs.map((name, at) => [runs.length === 1 ? "Run" : `Run ${plain(name)}`, `view=run&run=${at}`]),
  ].map(([title, hash]) => make("a", { href: `#${hash}`, "data-hash": hash }, title)));
  byId("title").textContent = plain(runs.length ? runs[0] : store.path.split("/").at(-1));
  document.title = `${byId("title").textContent} · foretell`;
  if (store) {
    byId("path").textContent = plain(store.path);
    facts(store);
    prepareFinder(store);
  }
  addEventListener("hashchange", () => attempt(follow));
  await follow();
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
  byId("damaged").replaceChildren(...store.damaged.map((reason) => make("li", {}, plain(reason))));
  byId("damaged").hidden = !store.damaged.length;
}

// Show what the address behind # asks for.
async function follow() {
  if (location.hash === "#main") return; // the skip link
  tell("");
  const wanted = asked();
  const next = wanted.get("view") ?? (shown.store ? "store" : "run");
  const nextRun = next === "run" ? Number(wanted.get("run") ?? 0) : null;
  byId("store").hidden = next !== "store";
  byId("run").hidden = next !== "run";
  const own = next === "run" ? `view=run&run=${nextRun}` : "view=store";
  for (const link of byId("views").children) {
    if (link.dataset.hash === own) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const changed = next !== view || nextRun !== run;
  const first = next === "store" && view !== "store";
  [view, run] = [next, nextRun];
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
