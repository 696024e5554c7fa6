"use strict";

const sheet = document.body.dataset.sheet;
const place = `foretell.listening.${sheet}`;
const questions = [...document.querySelectorAll(".question")];
const players = [...document.querySelectorAll("audio")];
const element = (id) => document.getElementById(id);

// What is kept over a reload: who listens, where they are, and item → answer.
const kept = { listener: "", current: 0, answers: {} };

function tell(message) {
  element("notice").textContent = message;
  element("notice").hidden = !message;
}

function keep() {
  try {
    localStorage.setItem(place, JSON.stringify(kept));
  } catch {
    tell("This browser keeps nothing: download your answers before you close the page.");
  }
}

function restore() {
  try {
    Object.assign(kept, JSON.parse(localStorage.getItem(place) ?? "{}"));
  } catch {
    tell("What this browser kept of your answers cannot be read: please start again.");
  }
  kept.current = Math.min(Math.max(Number(kept.current) || 0, 0), questions.length - 1);
  element("listener").value = kept.listener;
  for (const question of questions) {
    const answer = kept.answers[question.dataset.item];
    for (const choice of question.querySelectorAll("input")) choice.checked = choice.value === answer;
  }
}

const isOpen = (question) => !(question.dataset.item in kept.answers);

function showLeft() {
  const left = questions.filter(isOpen).length;
  element("left").textContent = left
    ? `${left} of ${questions.length} left`
    : "All answered: download your answers and send them back";
  element("progress").value = questions.length - left;
  element("unanswered").disabled = !left;
}

function show(index) {
  kept.current = index;
  for (const player of players) player.pause();
  questions.forEach((question, number) => { question.hidden = number !== index; });
  element("previous").disabled = index === 0;
  element("next").disabled = index === questions.length - 1;
  keep();
}

function go(index) {
  if (index < 0 || index >= questions.length) return;
  show(index);
  questions[index].focus();
}

function goToUnanswered() {
  const later = questions.findIndex((question, number) => number > kept.current && isOpen(question));
  go(later >= 0 ? later : questions.findIndex(isOpen));
}

function answer(choice) {
  kept.answers[choice.name] = choice.value;
  keep();
  showLeft();
}

const cell = (text) => (/[",;\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function answersFile() {
  const rows = questions.map(({ dataset: { item, kind, a, b } }) => {
    const given = kept.answers[item] ?? "";
    return [sheet, item, kind, a, b, given, given && kept.listener.trim()];
  });
  const table = [["sheet", "item", "kind", "a", "b", "answer", "listener"], ...rows];
  // The mark at the start tells spreadsheets that this is UTF-8.
  return `\ufeff${table.map((row) => row.map(cell).join(",")).join("\r\n")}\r\n`;
}

function download() {
  if (!kept.listener.trim()) {
    tell("Please write your name or initials above first.");
    element("listener").focus();
    return;
  }
  tell("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([answersFile()], { type: "text/csv" }));
  link.download = `${sheet}-${kept.listener.trim().replace(/[^\p{L}\p{N}]+/gu, "_")}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function toggle(player) {
  if (!player) return;
  if (player.paused) player.play(); else player.pause();
}

function press(event) {
  const typing = event.target.matches("input[type=text]");
  if (typing || !element("shortcuts").checked || event.ctrlKey || event.metaKey || event.altKey) return;
  const question = questions[kept.current];
  const key = event.key.toLowerCase();
  const choice = /^[1-9]$/.test(key) && question.querySelectorAll("input")[Number(key) - 1];
  if (choice) {
    choice.checked = true;
    choice.focus();
    answer(choice);
  } else if (key === "a" || key === "b") {
    toggle(question.querySelectorAll("audio")["ab".indexOf(key)]);
  } else if (key === "n") {
    go(kept.current + 1);
  } else if (key === "p") {
    go(kept.current - 1);
  }
}

element("questions").addEventListener("change", (event) => answer(event.target));
element("listener").addEventListener("input", (event) => {
  kept.listener = event.target.value;
  keep();
});
element("previous").addEventListener("click", () => go(kept.current - 1));
element("next").addEventListener("click", () => go(kept.current + 1));
element("unanswered").addEventListener("click", goToUnanswered);
element("download").addEventListener("click", download);
document.addEventListener("keydown", press);
for (const player of players) {
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
  });
  player.addEventListener("error", () => {
    tell("A clip cannot be played: keep the folder “clips” beside this page.");
  });
}
restore();
show(kept.current);
showLeft();
