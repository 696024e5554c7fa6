// A clip to hear and to see: waveform, spectrogram, and where in them it plays.

import { address, ask, duration, make, makeSvg } from "./dom.js";

const players = new Set();

// Clips are fetched when they come near to where a person looks.
const NEAR = { rootMargin: "500px" };

// One clip. `where` are the parameters of its address; `hear` gets the time while it plays.
export function player(title, where, { colour = 1, details = null, hear = null } = {}) {
  const audio = make("audio", {
    controls: true, preload: "none", src: address("clip.wav", where), "aria-label": title,
  });
  const mark = make("span", { class: "mark", hidden: true });
  const sight = make("div", { class: "sight" }, make("p", { class: "wait" }, "Loading the clip"));
  const length = make("span", { class: "length" });
  const box = make("div", { class: `clip c${colour}` },
    make("h4", {}, make("span", { class: "dot" }), title, length), sight, audio, details);
  let seconds = 0;

  function follow() {
    if (!audio.isConnected) return;
    const known = seconds || audio.duration || 0;
    mark.hidden = !known || (audio.paused && audio.currentTime === 0);
    mark.style.left = known ? `${(100 * audio.currentTime) / known}%` : "0";
    hear?.(audio.currentTime);
    if (!audio.paused) requestAnimationFrame(follow);
  }

  for (const event of ["play", "seeked", "pause", "ended"]) audio.addEventListener(event, follow);
  audio.addEventListener("play", () => {
    for (const other of players) if (other !== audio) other.pause();
  });
  sight.addEventListener("click", (event) => {
    const { left, width } = sight.getBoundingClientRect();
    seek(((event.clientX - left) / width) * seconds);
    audio.play();
  });

  function seek(time) {
    audio.currentTime = Math.max(0, Math.min(time, seconds || Infinity));
  }

  // Why a clip cannot be heard stands in its place, and others go on.
  async function draw() {
    try {
      await drawSight();
    } catch (error) {
      sight.replaceWith(make("p", {}, error.message));
      audio.remove();
    }
  }

  async function drawSight() {
    const facts = await ask("api/outline", where);
    seconds = facts.seconds;
    length.textContent = duration(seconds);
    sight.replaceChildren(
      outline(facts.outline),
      make("img", {
        src: address("spectrogram.png", where),
        alt: `Spectrogram of ${title}, up to ${facts.rate_hz / 2000} kHz`,
      }),
      mark,
    );
  }

  const watch = new IntersectionObserver((seen) => {
    if (!seen.some(({ isIntersecting }) => isIntersecting)) return;
    watch.disconnect();
    draw();
  }, NEAR);
  watch.observe(sight);
  players.add(audio);

  function release() {
    watch.disconnect();
    audio.pause();
    players.delete(audio);
  }

  return { box, audio, seek, release };
}

function outline(points) {
  const most = Math.max(0.05, ...points.flat().map(Math.abs));
  const place = (value) => (1 - value / most).toFixed(3);
  const upper = points.map(([, high], at) => `${at} ${place(high + 0.006 * most)}`);
  const lower = points.map(([low], at) => `${at} ${place(low - 0.006 * most)}`).reverse();
  return makeSvg("svg", {
    viewBox: `0 0 ${Math.max(1, points.length - 1)} 2`, preserveAspectRatio: "none", "aria-hidden": "true",
  }, makeSvg("path", { d: `M${[...upper, ...lower].join("L")}Z` }));
}
