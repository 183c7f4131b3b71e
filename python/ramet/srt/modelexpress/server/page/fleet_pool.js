// Owns what the page shows of standbys, and how many instances of a model are wanted.
"use strict";

let pool = null, drawnPool = "";

function standbyRow(one) {
  const words = one.error ? `failed: ${one.error}` : one.kept.length ? `keeps ${one.kept.join(", ")}` : "";
  const state = { standby: one.is_warm ? "● warm" : "◐ warming", warming: "◐ warming", becoming: "◐ becoming", serving: "● serving" };
  return element("tr", {}, element("td", {}, shortName(one.instance)), element("td", {}, state[one.state] || one.state),
    element("td", {}, one.model), element("td", { class: one.error ? "alarm" : "" }, words));
}

function scaleRow(one) {
  const wanted = one.wanted === null ? "any number" : String(one.wanted);
  const input = element("input", { type: "number", min: "0", max: "10000", value: String(one.wanted ?? one.serving.length), "aria-label": `Instances of ${one.model}` });
  const form = element("form", {}, input, element("button", {}, "Scale"));
  form.addEventListener("submit", (event) => { event.preventDefault(); scaleTo(one.model, Number(input.value)); });
  const becoming = one.becoming.length ? `, ${one.becoming.length} become it` : "";
  return element("tr", {}, element("td", {}, one.model), element("td", {}, `${one.serving.length} of ${wanted}${becoming}`),
    element("td", {}, form), element("td", { class: one.error ? "alarm" : "" }, one.error));
}

function scaleOther() {
  const name = element("input", { type: "text", placeholder: "Another model", "aria-label": "Another model" });
  const count = element("input", { type: "number", min: "0", max: "10000", value: "1", "aria-label": "Its instances" });
  const form = element("form", {}, name, count, element("button", {}, "Scale"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (name.value.trim()) scaleTo(name.value.trim(), Number(count.value));
  });
  return form;
}

async function scaleTo(model, instances) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const said = byId("scaled");
  try {
    const body = JSON.stringify({ model, instances });
    const answer = await fetch("fleet/scale", { method: "POST", headers, body, signal: AbortSignal.timeout(ANSWER_TIMEOUT_MS) });
    const outcome = await answer.json();
    said.textContent = answer.ok ? `${model}: ${instances} wanted.` : `${model}: ${outcome.detail}`;
    document.activeElement.blur();
    poll();
  } catch (error) {
    said.textContent = `${model}: ${error.message}`;
  }
}

function poolTable(heads, rows) {
  return element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...rows));
}

function drawPool() {
  const section = byId("pool");
  const shape = JSON.stringify(pool);
  section.hidden = !pool || !(pool.standbys.length || pool.models.length);
  if (section.hidden || shape === drawnPool || section.contains(document.activeElement)) return; // somebody types there
  drawnPool = shape;
  const said = byId("scaled") ? byId("scaled").textContent : "";
  section.replaceChildren(element("h2", {}, "Standbys"),
    poolTable(["instance", "state", "model", ""], pool.standbys.map(standbyRow)),
    ...(pool.models.length ? [poolTable(["model", "instances", "wanted", ""], pool.models.map(scaleRow))] : []),
    scaleOther(), element("p", { id: "scaled", role: "status" }, said));
}
