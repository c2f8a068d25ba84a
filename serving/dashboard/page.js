// The dashboard: asks the API every few seconds and shows what it says. Everything from the API is text, never markup.

import { drawLines } from "/dashboard/charts.js";

const LOOK_MS = 5000;
const byId = (id) => document.getElementById(id);
const FRESHNESS = {
  state: "the user's next answer", row: "the item's own row", dense: "shared weights", weights: "all weights", adapter: "the encoder",
};

/* Return a new element with text or children. */
function make(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function ask(method, path, body) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  const told = await answer.json();
  if (!answer.ok) throw new Refused(answer.status, told.detail ?? `status ${answer.status}`);
  return told;
}

/* Run a step; where it is refused say why, and ask for a key where one is missing. */
async function attempt(step) {
  try {
    await step();
    byId("problem").hidden = true;
  } catch (error) {
    if (error.status === 401 || error.status === 403) byId("key-form").hidden = false;
    byId("problem").textContent = error.status ? error.message : `The server does not answer (${error.message}).`;
    byId("problem").hidden = false;
  }
}

function ms(value) {
  if (value === null) return "–";
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

function showTraffic({ replica, seconds, slices }) {
  byId("replica").textContent = `replica ${replica}, slices of ${seconds} s`;
  const line = (name, of) => ({ name, points: slices.map((slice) => [slice.at_us / 1000, of(slice)]) });
  drawLines(byId("requests"), "Requests a second", [
    line("answered", (slice) => (slice.requests - slice.refused - slice.failed) / seconds),
    line("refused", (slice) => slice.refused / seconds),
    line("failed", (slice) => slice.failed / seconds),
  ]);
  drawLines(byId("latency"), "Latency", [line("p50", (s) => s.p50_ms), line("p99", (s) => s.p99_ms)], { unit: "ms" });
}

function showFeedback(rows) {
  const arms = [...new Set(rows.map((row) => row.arm))].sort();
  const lines = (of) => arms.map((arm) => ({
    name: arm, points: rows.filter((row) => row.arm === arm).map((row) => [row.minute_us / 1000, of(row)]),
  }));
  drawLines(byId("ctr"), "CTR", lines((row) => row.ctr));
  drawLines(byId("hits"), "Hit rate", lines((row) => row.hit_rate));
}

function showVersions(told) {
  const arms = Object.entries(told.arms).map(([arm, version]) => `${arm} ${version}`).join(", ");
  byId("served").textContent = `serving ${told.served}${told.served === told.current ? "" : `, promoted ${told.current}`}`;
  const facts = {
    "Arms": arms,
    "Learned up to": `event ${told.learned_seq} of ${told.head_seq}`,
    "Items": told.items,
    "Canary": told.canary ? `${told.canary.version} for ${(100 * told.canary.share).toFixed(0)}% of users` : "none",
    "Problems": Object.entries(told.problems).map(([what, problem]) => `${what}: ${problem}`).join("; ") || "none",
  };
  byId("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [
    make("dt", { textContent: name }), make("dd", { textContent: value }),
  ]));
  const times = { ...told.freshness_ms, weights: told.weights_freshness_ms };
  byId("freshness").tBodies[0].replaceChildren(...Object.entries(FRESHNESS).filter(([name]) => times[name]).map(([name, what]) =>
    make("tr", {}, make("th", { scope: "row", textContent: what }), ...[ms(times[name].p50), ms(times[name].p99), times[name].events]
      .map((value) => make("td", { textContent: value })))));
  const focused = document.activeElement?.dataset?.version;
  byId("versions").tBodies[0].replaceChildren(...told.history.toReversed().map((move) => {
    const button = make("button", { type: "button", textContent: "Promote", disabled: move.version === told.current });
    button.dataset.version = move.version;
    button.setAttribute("aria-label", `Promote ${move.version}`);
    button.addEventListener("click", () => moveTo("/v1/versions/promote", { version: move.version, reason: "dashboard" }));
    const when = new Date(move.at_us / 1000).toLocaleString();
    return make("tr", {}, make("th", { scope: "row", textContent: move.version }), make("td", { textContent: when }),
      make("td", { textContent: move.reason || "–" }), make("td", {}, button));
  }));
  if (focused) byId("versions").querySelector(`button[data-version="${focused}"]`)?.focus();
  if (!byId("arm").options.length) {
    byId("arm").append(...Object.keys(told.arms).map((arm) => make("option", { textContent: arm })));
  }
}

function showLearning(points) {
  drawLines(byId("loss"), "Log loss of what was learned, each event before it is learned from", [
    { name: "learned", points: points.map((point) => [point.seq, point.learned]) },
    { name: "without learning", points: points.map((point) => [point.seq, point.base]) },
  ], { axis: (seq) => `event ${seq}` });
}

async function moveTo(path, body) {
  await attempt(async () => {
    const moved = await ask("POST", path, body);
    byId("moved").textContent = `Promoted ${moved.promoted}; before it was ${moved.before}.`;
    await look();
  });
}

async function look() {
  const [versions, stats] = await Promise.all([ask("GET", "/v1/versions"), ask("GET", "/v1/stats")]);
  showVersions(versions);
  showTraffic(stats.replica);
  showFeedback(stats.feedback);
  showLearning(stats.learning);
}

async function showUser(userId, arm) {
  const path = `/v1/users/${encodeURIComponent(userId)}?k=20`;
  const [user, slate] = await Promise.all([
    ask("GET", path), ask("POST", "/v1/recommend", { user_id: userId, arm, k: 10, with_text: true }),
  ]);
  byId("history").replaceChildren(...user.history.toReversed().map((entry) =>
    make("li", {}, entry.text ?? entry.item_id, make("small", { textContent: ` ${entry.kind}${entry.value === null ? "" : ` ${entry.value}`}` }))));
  byId("slate").replaceChildren(...slate.items.map((item) => {
    const button = make("button", { type: "button", className: "item", textContent: item.text || item.item_id });
    button.addEventListener("click", () => attempt(() => showReasons(userId, item, arm)));
    return make("li", {}, button, make("small", { textContent: ` ${item.score.toFixed(2)}` }));
  }));
  const said = slate.cold_start ? "Nothing the user did could be used: this is what is popular." : "Choose an item of the slate.";
  byId("why").replaceChildren(make("p", { className: "note", textContent: said }));
}

async function showReasons(userId, item, arm) {
  const told = await ask("POST", "/v1/explain", { user_id: userId, item_id: item.item_id, arm });
  const reasons = told.because.map((reason) => make("li", {}, `${reason.text ?? reason.item_id} `,
    make("small", { textContent: `${reason.kind}, ${reason.adds >= 0 ? "+" : "−"}${Math.abs(reason.adds).toFixed(3)}` })));
  const about = told.cold_start ? "It is popular; nothing the user did could be used." :
    `Score ${told.score.toFixed(3)}, from ${told.interactions} interactions${told.user_has_row ? " and the user's own row" : ""}.`;
  byId("why").replaceChildren(
    make("p", {}, make("strong", { textContent: item.text || item.item_id })),
    make("p", { textContent: told.item_is_new ? `${about} The item is new, and placed by its text.` : about }),
    ...(reasons.length ? [make("p", { className: "note", textContent: "What each of these adds to the score:" }), make("ul", {}, ...reasons)] : []),
  );
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").setAttribute("aria-pressed", dark);
}

setTheme((localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark");
byId("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  localStorage.setItem("theme", dark ? "dark" : "light");
  setTheme(dark);
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value.trim());
  byId("key").value = "";
  attempt(look);
});
byId("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(() => showUser(byId("user").value, byId("arm").value || undefined));
});
byId("roll-back").addEventListener("click", () => moveTo("/v1/versions/rollback", { reason: "dashboard" }));

/* One look after the other, none while the page is hidden. */
async function follow() {
  if (!document.hidden) await attempt(look);
  setTimeout(follow, LOOK_MS);
}
follow();
