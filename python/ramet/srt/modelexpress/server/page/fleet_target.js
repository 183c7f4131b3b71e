// Owns the dialog in which an operator sets the version that all instances of a model shall serve.
"use strict";

const CLOSE_AFTER_MS = 1500; // so that what the server has said can be read

const SHARE = 75; // percent, which the server leaves out of its answers

// What is said of a target that the server has taken.
function targetWords(target) {
  const share = target.min_serving === undefined ? SHARE : Math.round(100 * target.min_serving);
  return target.version ? `Target ${target.version}: at least ${share} % go on serving.` : "There is no target any more.";
}

async function sendTarget(target) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const answer = await fetch("fleet/targets", { method: "POST", headers, body: JSON.stringify(target), signal: AbortSignal.timeout(ANSWER_TIMEOUT_MS) });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(said.detail || `HTTP ${answer.status}`);
  return said;
}

function openTargetDialog(model) {
  const known = [...new Set(model.instances.flatMap((instance) => instance.workers.map((worker) => worker.weight_version)).filter(Boolean))];
  const version = element("input", { type: "text", maxlength: 256, autocomplete: "off", list: "known-versions", required: "", name: "version" });
  const share = element("input", { type: "number", value: SHARE, min: 0, max: 100, step: 1, required: "", name: "share" });
  const said = element("p", { role: "status" });
  const set = element("button", {}, "Set target");
  const clear = element("button", { type: "button", class: "step" }, "No target");
  const cancel = element("button", { type: "button", class: "step" }, "Close");
  const form = element("form", {}, element("h2", {}, `Version of ${model.model_name}`),
    element("p", { class: "soft" }, "Instances take it in turns, from whoever has it, and are not ready while they do. If it fails, they go back."),
    element("label", {}, "Version that all instances shall serve", version), element("datalist", { id: "known-versions" }, ...known.map((name) => element("option", { value: name }))),
    element("label", {}, "Share that goes on serving, in percent", share), said, element("div", { class: "buttons" }, set, clear, cancel));
  const dialog = element("dialog", { "aria-label": `Version of ${model.model_name}` }, form);
  const send = async (name) => {
    for (const button of [set, clear]) button.disabled = true;
    said.className = "soft";
    said.textContent = "asking the server …";
    try {
      said.textContent = targetWords(await sendTarget({ model: model.model_name, version: name, min_serving: Number(share.value) / 100 }));
      poll();
      setTimeout(() => dialog.close(), CLOSE_AFTER_MS);
    } catch (error) {
      said.className = "warn";
      said.textContent = `Nothing has changed: ${error.message}`;
      for (const button of [set, clear]) button.disabled = false;
    }
  };
  form.addEventListener("submit", (event) => { event.preventDefault(); send(version.value); });
  clear.addEventListener("click", () => send(""));
  cancel.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  version.focus();
}

// Drawn with the head of a model's table.
function targetButton(model) {
  const button = element("button", { class: "step", "aria-label": `Set the version of ${model.model_name}` }, "Set version …");
  button.addEventListener("click", () => openTargetDialog(model));
  return button;
}
