// The dashboard: asks the API every few seconds and shows what it says. Everything from the API is text, never markup.

import { drawLines } from "/dashboard/charts.js";

const LOOK_MS = 5000;
let lacksKey = false, failed = null;
const byId = (id) => document.getElementById(id);
const FRESHNESS = {
  state: "user state", row: "the item's row", dense: "dense weights", weights: "all weights", adapter: "the text encoder",
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

/* Say what is wrong, or nothing; what has been said is not said again, which would be read out again. */
function tell(problem) {
  if (byId("problem").textContent !== problem) byId("problem").textContent = problem;
  byId("problem").hidden = !problem;
}

/* Run a step; where it is refused say why until one of its kind succeeds, and ask for a key where one is missing. */
async function attempt(kind, step) {
  try {
    await step();
    if (failed === kind) tell("");
  } catch (error) {
    failed = kind;
    if (error.status === 401 || error.status === 403) {
      lacksKey = true;
      byId("key-form").hidden = false;
    }
    tell(error.status ? error.message : `The server does not answer (${error.message}).`);
  }
}

function ms(value) {
  if (value === null) return "–";
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

function showTraffic({ replica, slices }) {
  byId("replica").textContent = `Of the replica that answered, ${replica}: without health checks and what this page asks.`;
  const whole = slices.length > 1 ? slices.slice(0, -1) : slices; // the newest goes on
  const line = (name, of) => ({ name, points: whole.map((slice) => [slice.at_us / 1000, of(slice)]) });
  drawLines(byId("requests"), "Requests a second", [
    line("answered", (slice) => (slice.requests - slice.refused - slice.failed) / slice.seconds),
    line("refused", (slice) => slice.refused / slice.seconds),
    line("failed", (slice) => slice.failed / slice.seconds),
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

function showLearning(deltas) {
  const lines = (learned, base) => [
    { name: "learning", points: deltas.map((delta) => [delta.seq, delta[learned]]) },
    { name: "without", points: deltas.map((delta) => [delta.seq, delta[base]]) },
  ];
  const axis = (seq) => `event ${seq}`;
  drawLines(byId("loss"), "Log loss", lines("log_loss", "base_log_loss"), { axis, fromZero: false });
  drawLines(byId("ndcg"), "NDCG@10", lines("ndcg_at_10", "base_ndcg_at_10"), { axis, fromZero: false });
}

function showGlance(versions, { replica: { slices }, feedback }) {
  const recent = slices.slice(-12), sum = (rows, of) => rows.reduce((total, row) => total + of(row), 0);
  const requests = sum(recent, (s) => s.requests), p99 = Math.max(...recent.map((s) => s.p99_ms ?? -1));
  const shown = sum(feedback, (row) => row.impressions), slates = sum(feedback, (row) => row.slates);
  const share = (part, whole) => (whole ? `${(100 * part / whole).toFixed(1)}%` : "–");
  const facts = {
    "Requests a second, last minute": (requests / sum(recent, (s) => s.seconds)).toFixed(1),
    "Worst p99, last minute": ms(p99 < 0 ? null : p99),
    "CTR": share(sum(feedback, (row) => row.clicks), shown),
    "Hit rate": share(sum(feedback, (row) => row.hit_rate * row.slates), slates),
    "Ack to user state, p50": ms(versions.freshness_ms.state.p50),
    "Ack to weights, p50": ms(versions.weights_freshness_ms.p50),
  };
  byId("glance").replaceChildren(...Object.entries(facts).map(([name, value]) =>
    make("li", {}, make("small", { textContent: name }), make("strong", { textContent: value }))));
}

function showState(told) {
  const served = `serving ${told.served}${told.served === told.current ? "" : `, promoted ${told.current}`}`;
  if (byId("served").textContent !== served) byId("served").textContent = served;
  const facts = {
    "Arms": Object.entries(told.arms).map(([arm, version]) => `${arm} ${version}`).join(", "),
    "Learned up to": `event ${told.learned_seq} of ${told.head_seq}`,
    "Items": told.items,
    "Canary": told.canary ? `${told.canary.version} for ${(100 * told.canary.share).toFixed(0)}% of users` : "none",
    "Problems": Object.entries(told.problems).map(([what, problem]) => `${what}: ${problem}`).join("; ") || "none",
  };
  byId("facts").replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [
    make("dt", { textContent: name }), make("dd", { textContent: value }),
  ]));
  const times = { ...told.freshness_ms, weights: told.weights_freshness_ms };
  byId("freshness").tBodies[0].replaceChildren(...Object.entries(FRESHNESS).map(([name, what]) =>
    row(what, ms(times[name].p50), ms(times[name].p99), times[name].events)));
  if (!byId("arm").options.length) {
    byId("arm").append(...Object.keys(told.arms).map((arm) => make("option", { textContent: arm })));
  }
}

function row(name, ...cells) {
  return make("tr", {}, make("th", { scope: "row", textContent: name }), ...cells.map((cell) => make("td", {}, cell)));
}

function showVersions({ versions, moves }) {
  const focused = document.activeElement?.dataset?.version;
  byId("versions").tBodies[0].replaceChildren(...versions.map(({ version, created_us, learned_seq, system, promoted }) => {
    const button = make("button", { type: "button", textContent: "Promote" });
    button.dataset.version = version;
    button.setAttribute("aria-label", `Promote version ${version}`);
    button.addEventListener("click", () => promote(version));
    const name = `${version} ${system === "two_stage" ? "" : system}`;
    return row(name, when(created_us), `event ${learned_seq}`, promoted ? make("strong", { textContent: `serves as ${promoted}` }) : button);
  }));
  if (focused) byId("versions").querySelector(`button[data-version="${focused}"]`)?.focus();
  byId("moves").tBodies[0].replaceChildren(...moves.toReversed().slice(0, 10).map((move) =>
    row(move.version, when(move.at_us), move.reason || "–")));
}

function when(atUs) {
  return new Date(atUs / 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

function promote(version) {
  if (confirm(`Have version ${version} answer, on all replicas?`)) moveTo("/v1/versions/promote", { version });
}

function rollBack() {
  if (confirm("Have the version before answer again, on all replicas?")) moveTo("/v1/versions/rollback", {});
}

async function moveTo(path, body) {
  await attempt("move", async () => {
    const moved = await ask("POST", path, { ...body, reason: byId("reason").value || "dashboard" });
    byId("moved").textContent = `Promoted ${moved.promoted}; before it was ${moved.before ?? "none"}.`;
    byId("reason").value = "";
    await look();
  });
}

async function look() {
  const [versions, stats] = await Promise.all([ask("GET", "/v1/versions"), ask("GET", "/v1/stats")]);
  showGlance(versions, stats);
  showState(versions);
  showVersions(stats);
  showTraffic(stats.replica);
  showFeedback(stats.feedback);
  showLearning(stats.learning);
}

async function showUser(userId, arm) {
  const path = `/v1/users/${encodeURIComponent(userId)}?k=12`;
  const [user, slate] = await Promise.all([
    ask("GET", path), ask("POST", "/v1/recommend", { user_id: userId, arm, k: 10, with_text: true }),
  ]);
  byId("history").replaceChildren(...user.history.toReversed().map((entry) =>
    make("li", {}, entry.text ?? entry.item_id, make("small", { textContent: ` ${entry.kind}${entry.value === null ? "" : ` ${entry.value}`}` }))));
  byId("slate").replaceChildren(...slate.items.map((item) => {
    const button = make("button", { type: "button", className: "item", textContent: item.text || item.item_id });
    button.addEventListener("click", () => attempt("user", () => showReasons(userId, item, arm)));
    return make("li", {}, button, make("small", { textContent: ` ${item.score.toFixed(2)}` }));
  }));
  const said = slate.cold_start ? "Nothing the user did could be used: this is what is popular." : "Choose an item of the slate.";
  byId("why").replaceChildren(make("p", { className: "note", textContent: said }));
}

function describe(told) {
  if (told.cold_start) return "It is popular: nothing the user did could be used.";
  const from = `${told.interactions} interaction${told.interactions === 1 ? "" : "s"}`;
  const basis = [from, ...(told.user_has_row ? ["the user's own row"] : []), ...(told.uses_text ? ["the item's text"] : [])];
  const said = `Score ${told.score.toFixed(3)}, place ${told.place} of ${told.among} candidates, from ${basis.join(", ")}.`;
  return told.item_is_new ? `${said} The item is new: its text alone says where it stands.` : said;
}

async function showReasons(userId, item, arm) {
  const told = await ask("POST", "/v1/explain", { user_id: userId, item_id: item.item_id, arm });
  const reasons = told.because.map(({ text, item_id, kind, adds }) => make("li", {}, `${text ?? item_id} `,
    make("small", { textContent: `${kind}, ${adds === null ? "all there is" : (adds >= 0 ? "+" : "−") + Math.abs(adds).toFixed(3)}` })));
  byId("why").replaceChildren(
    make("p", {}, make("strong", { textContent: item.text || item.item_id })),
    make("p", { textContent: describe(told) }),
    ...(reasons.length ? [make("p", { className: "note", textContent: "What each of these adds to the score:" }), make("ul", {}, ...reasons)] : []),
  );
}

/* The toggle's choice is kept; without one the system's holds. */
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function showTheme() {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
  byId("theme").setAttribute("aria-pressed", (chosen ?? (prefersDark.matches ? "dark" : "light")) === "dark");
}
showTheme();
prefersDark.addEventListener("change", showTheme);
byId("theme").addEventListener("click", () => {
  localStorage.setItem("theme", byId("theme").getAttribute("aria-pressed") === "true" ? "light" : "dark");
  showTheme();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value.trim());
  byId("key").value = "";
  lacksKey = false;
  tell("");
  attempt("look", look);
});
byId("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt("user", () => showUser(byId("user").value, byId("arm").value || undefined));
});
byId("roll-back").addEventListener("click", rollBack);

/* One look after the other, none while the page is hidden or lacks a key. */
async function follow() {
  if (!document.hidden && !lacksKey) await attempt("look", look);
  setTimeout(follow, LOOK_MS);
}
follow();
