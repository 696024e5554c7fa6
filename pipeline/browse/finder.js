// The list of rollouts: searched, filtered and paged by the server.

import { ask, attempt, byId, count, duration, make, news, number, plain, significant } from "./dom.js";
import { keyOf } from "./rollout.js";

const PAUSE_MS = 200;
let start = 0;
let asked = 0;
let matched = 0;
let pageRollouts = 1;
let hasEntropy = true; // of the store
let listed = 0; // rollouts of the store when the list was made

const links = () => [...byId("rollouts").querySelectorAll("a")];

export function prepareFinder(store) {
  const form = byId("filters");
  hasEntropy = store.has_entropy;
  offerReasons(store);
  if (!store.has_entropy) {
    for (const name of ["least_entropy", "most_entropy"]) form.elements[name].parentElement.remove();
    for (const option of form.querySelectorAll("option[value$=entropy]")) option.remove();
    form.querySelector(".hint").remove();
  }
  let pause = 0;
  const later = () => {
    clearTimeout(pause);
    pause = setTimeout(() => attempt(() => find(0)), PAUSE_MS);
  };
  form.addEventListener("input", later);
  form.addEventListener("reset", later);
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => attempt(() => find(start - pageRollouts)));
  byId("next").addEventListener("click", () => attempt(() => find(start + pageRollouts)));
  byId("further").addEventListener("click", () => attempt(() => find(start)));
  byId("rollouts").addEventListener("keydown", (event) => attempt(() => walk(event)));
  byId("rollouts").addEventListener("click", (event) => {
    // Where the list lies above the rollout, who chose one is taken to it.
    const below = matchMedia("(max-width: 900px)").matches;
    if (below && event.target.closest("a")) byId("rollout").scrollIntoView();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
    event.preventDefault();
    form.elements.text.focus();
  });
}

// The reasons for which rollouts ended, to choose from; what is chosen stays so.
function offerReasons(store) {
  const select = byId("filters").elements.stop_reason;
  const chosen = select.value;
  const reasons = Object.entries(store.stop_reasons).map(([reason, times]) =>
    make("option", { value: reason }, `${plain(reason)} (${number(times)})`));
  select.replaceChildren(select.options[0], ...reasons);
  if (chosen in store.stop_reasons) select.value = chosen;
}

// Take in what the store holds by now. The list of a person who reads it stays until they ask.
export async function renewFinder(store) {
  offerReasons(store);
  const more = store.rollouts - listed;
  if (!more) return;
  if (!listed) {
    await find(0);
    return;
  }
  news(byId("more"), more > 0 ? `${count(more, "more rollout")} ${more === 1 ? "was" : "were"} committed.`
    : "Rollouts were taken out of the store.", "Update the list", () => find(start));
}

// Show a page of what the fields ask for.
export async function find(from) {
  const mine = ++asked;
  const fields = Object.fromEntries(new FormData(byId("filters")));
  const found = await ask("api/rollouts", { ...fields, start: Math.max(0, from) });
  if (mine !== asked) return;
  ({ start, matched, page_rollouts: pageRollouts } = found);
  listed = found.rollouts;
  news(byId("more"), "");
  const byEntropy = fields.least_entropy || fields.most_entropy || fields.order.endsWith("entropy");
  const open = byEntropy && found.entropy_known < found.entropy_of;
  byId("found").textContent = told(found, open);
  byId("further").hidden = !open;
  byId("rollouts").replaceChildren(...found.rows.map(entry));
  byId("rollouts").scrollTop = 0;
  const last = start + found.rows.length;
  byId("page").textContent = found.rows.length
    ? `${number(start + 1)}–${number(last)} of ${number(matched)}` : "";
  byId("previous").disabled = start === 0;
  byId("next").disabled = last >= matched;
  markCurrent();
  attempt(() => fillEntropies(mine, found.rows));
}

function told(found, open) {
  const all = found.matched === found.rollouts ? count(found.rollouts, "rollout")
    : `${number(found.matched)} of ${count(found.rollouts, "rollout")}`;
  if (!open) return all;
  const [known, of] = [found.entropy_known, found.entropy_of].map(number);
  return `${all}. The entropy is known of ${known} of the ${of} that match otherwise.`;
}

const numbers = ({ timesteps, seconds, stop_reason: reason, entropy }) => [
  count(timesteps, "step"),
  seconds === null ? null : duration(seconds),
  hasEntropy ? plain(reason) : null, // rollouts of codes alone end for a reason
  entropy === null ? null : `${significant(entropy)} nats`,
].filter(Boolean).join(" · ");

function entry(row) {
  return make("li", {}, make("a", { href: `#${keyOf(row.sample_id, row.variation)}`, "data-place": row.place },
    make("span", { class: "name" }, plain(row.sample_id), row.variation ? ` / ${row.variation}` : ""),
    row.excerpt ? make("span", { class: "excerpt" }, plain(row.excerpt)) : null,
    make("span", { class: "numbers" }, numbers(row))));
}

// Entropies of a page come behind it, for the teacher's predictions must be read for them.
async function fillEntropies(mine, rows) {
  const unknown = rows.filter(({ entropy }) => entropy === null);
  if (!unknown.length || !hasEntropy) return;
  const found = await ask("api/entropies", { places: unknown.map(({ place }) => place).join(",") });
  if (mine !== asked) return;
  for (const row of unknown.filter(({ place }) => place in found)) {
    const link = byId("rollouts").querySelector(`[data-place="${row.place}"] .numbers`);
    link.textContent = numbers({ ...row, entropy: found[row.place] });
  }
}

// Mark the rollout that is shown.
export function markCurrent() {
  const shown = new URLSearchParams(location.hash.slice(1));
  const own = `#${keyOf(shown.get("sample") ?? "", shown.get("variation") ?? "0")}`;
  for (const link of links()) {
    if (link.getAttribute("href") === own) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

async function walk(event) {
  const all = links();
  const at = all.indexOf(document.activeElement);
  const goal = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (at < 0 || goal === undefined) return;
  event.preventDefault();
  if (goal >= all.length && !byId("next").disabled) {
    await find(start + pageRollouts);
    open(links()[0]);
  } else if (goal < 0 && start > 0) {
    await find(start - pageRollouts);
    open(links().at(-1));
  } else {
    open(all[Math.max(0, Math.min(all.length - 1, goal))]);
  }
}

function open(link) {
  link.focus();
  location.replace(link.getAttribute("href"));
}
