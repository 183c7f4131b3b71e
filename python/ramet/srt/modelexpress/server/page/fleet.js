// Owns what the page knows, when it asks the server for it, and what is drawn when.
"use strict";

const POLL_MS = 1500;
const ANSWER_TIMEOUT_MS = 10000;
const TOKEN = "ramet-fleet-token";

let snapshot = null, drawnShape = "", lastAnswer = 0, polling = false;

function filterWords() {
  return byId("filter-box").value.toLowerCase().split(/\s+/).filter(Boolean);
}

function matches(words, texts) {
  const text = words.length ? texts.join(" ").toLowerCase() : "";
  return words.every((word) => text.includes(word));
}

function filtered(models) {
  const words = filterWords();
  const texts = (model, instance) => [model.model_name, model.revision, model.source_id, instance.name, instance.host,
    ...instance.workers.flatMap((worker) => [worker.status, worker.weight_version])];
  return models
    .map((model) => ({ ...model, instances: model.instances.filter((instance) => matches(words, texts(model, instance))) }))
    .filter((model) => model.instances.length);
}

function drawTotals(models) {
  const instances = models.flatMap((model) => model.instances);
  const isLiving = (instance) => instance.status !== "STALE" && instance.status !== "SILENT";
  const living = instances.filter(isLiving);
  const silent = instances.filter((instance) => instance.status === "SILENT").length;
  const workers = living.flatMap((instance) => instance.workers);
  const takings = workers.map((worker) => worker.taking).filter((taking) => taking && taking.taken_from.length);
  const given = takings.flatMap((taking) => taking.taken_from.some((giver) => giver.num_bytes === null)
    ? [taking.num_bytes] : taking.taken_from.map((giver) => giver.num_bytes));
  const totals = [
    ["models", models.filter((model) => model.instances.some(isLiving)).length],
    ["instances", living.length],
    ["silent", silent],
    ["ranks ready", `${workers.filter((worker) => worker.status === "READY").length} of ${workers.length}`],
    ["ranks cloned", takings.length], ["taken from instances", formatBytes(given.reduce((sum, count) => sum + count, 0))],
  ];
  byId("totals").replaceChildren(...totals.map(([name, value]) =>
    element("div", { class: name === "silent" && value ? "alarm" : "" }, element("dt", {}, name), element("dd", {}, String(value)))));
  byId("totals").hidden = false;
}

function drawModels(models) {
  const opened = new Set([...document.querySelectorAll(".stale-ones[open]")].map((node) => node.dataset.source));
  const lone = snapshot.claims.filter((claim) => !snapshot.models.some((model) => model.model_name === claim.model_name));
  cells = new Map();
  byId("models").replaceChildren(
    ...models.map((model) => drawModel(model, snapshot.claims.filter((claim) => claim.model_name === model.model_name))),
    ...lone.map((claim) => element("section", {}, element("div", { class: "head" }, element("h2", {}, claim.model_name)),
      element("div", { class: "claim" }, `◐ ${shortName(claim.instance)} reads the files`))));
  for (const node of document.querySelectorAll(".stale-ones")) node.open = opened.has(node.dataset.source);
  drawTotals(models);
  const empty = snapshot.models.length || snapshot.claims.length ? "Nothing matches the filter." : "No instance has published anything yet.";
  showMessage(models.length || (lone.length && !byId("filter-box").value) ? "" : empty);
  byId("server").textContent = `Records in ${snapshot.store}. Other engines are silent after ${formatAge(snapshot.heartbeat_timeout_s)}.`;
}

// All that makes another page, and not only other numbers in it. Who took what from whom changes with num_loads.
function shapeOf(models) {
  const ofWorker = (worker) => [worker.worker_id, worker.worker_rank, worker.status, worker.weight_version];
  const ofInstance = (instance) => [instance.name, instance.host, instance.started_at, ...instance.workers.map(ofWorker)];
  return JSON.stringify([snapshot.num_loads, snapshot.models.length, snapshot.claims.map((claim) => [claim.model_name, claim.instance]),
    models.map((model) => [model.source_id, model.target, ...model.instances.map(ofInstance)])]);
}

function draw(anew) {
  if (!snapshot) return;
  const models = filtered(snapshot.models);
  const shape = shapeOf(models);
  if (anew || shape !== drawnShape) {
    drawnShape = shape;
    drawModels(models);
  }
  for (const model of models) for (const instance of model.instances) instance.workers.forEach(showPulse);
}

function showMessage(text, ...more) {
  byId("message").replaceChildren(text, ...more);
  byId("message").hidden = !text;
}

function askForToken(refused) {
  if (byId("token") && !refused) return;
  sessionStorage.removeItem(TOKEN);
  const form = element("form", {}, element("input", { id: "token", type: "password", "aria-label": "Bearer token", placeholder: "Bearer token", autocomplete: "off" }), element("button", {}, "Show the fleet"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(TOKEN, byId("token").value.trim());
    showMessage("");
    poll();
  });
  showMessage(refused ? "The server does not accept this token." : "This server wants a token.", form);
}

function setLive(text, lost) {
  const live = byId("live");
  if (live.textContent !== text) live.textContent = text;
  live.className = lost ? "lost" : "";
}

async function ask(path, token) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { headers, signal: AbortSignal.timeout(ANSWER_TIMEOUT_MS) });
  if (answer.status === 401) return null;
  if (!answer.ok) throw new Error((await answer.text()).trim() || `HTTP ${answer.status}`);
  return answer.json();
}

function takeLoads(answer, afresh) {
  loads = afresh ? answer.loads : [...loads, ...answer.loads];
  numLoads = answer.num_loads;
  drawTimeline();
}

async function refresh() {
  const token = sessionStorage.getItem(TOKEN);
  const first = !snapshot;
  const [answer, standbys, allLoads] = await Promise.all([ask("fleet.json", token), ask("fleet/scale", token), first ? ask("loads.json?after=0", token) : null]);
  if (!answer) { setLive("a token is needed", true); askForToken(Boolean(token)); return; }
  snapshot = answer;
  lastAnswer = Date.now();
  setLive("live", false);
  pool = standbys;
  drawPool();
  draw(false);
  if (allLoads) takeLoads(allLoads, true);
  if (first || snapshot.num_loads === numLoads) return;
  const afresh = snapshot.num_loads < numLoads; // another server, or this one was started again
  const newLoads = await ask(`loads.json?after=${afresh ? 0 : numLoads}`, token);
  if (newLoads) takeLoads(newLoads, afresh);
}

async function poll() {
  if (polling) return;
  polling = true;
  try {
    await refresh();
  } catch (error) {
    const since = lastAnswer ? ` since ${formatAge((Date.now() - lastAnswer) / 1000)}` : "";
    setLive(`no answer from the server${since}: ${error.message}`, true);
  }
  polling = false;
}

byId("filter-box").addEventListener("input", () => { draw(false); drawTimeline(); });
poll();
setInterval(() => { if (!document.hidden) poll(); }, POLL_MS);
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
