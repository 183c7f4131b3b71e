// Owns how models, their instances and the ranks of those are drawn.
"use strict";

const FIRST_DRAWN = 50; // instances of a model: drawing more takes long, and who looks for one filters
const COLUMNS = ["Instance", "Rank", "Status", "Heartbeat", "Load", "Weights from", "Size", "Time", "Rate"];
const NUMBERS = new Set(["Rank", "Heartbeat", "Size", "Time", "Rate"]);

const numDrawn = new Map(); // by source id, where it isn't FIRST_DRAWN
let cells = new Map(); // by worker id and rank: what changes all the time

// Instances below the one that gave them their weights: [instance, depth], depth first.
function lineage(instances) {
  const names = new Set(instances.map((instance) => instance.name));
  const children = new Map();
  for (const instance of instances) {
    const givers = instance.workers.flatMap((worker) => (worker.taking ? worker.taking.taken_from : []));
    const giver = givers.find((one) => names.has(one.instance) && one.instance !== instance.name);
    const parent = giver ? giver.instance : "";
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(instance);
  }
  const ordered = [], seen = new Set();
  const visit = (root) => {
    const waiting = [[root, 0]]; // no recursion: a chain may be longer than the stack
    while (waiting.length) {
      const [instance, depth] = waiting.pop();
      if (seen.has(instance)) continue;
      seen.add(instance);
      ordered.push([instance, depth]);
      const below = (children.get(instance.name) || []).map((child) => [child, depth + 1]);
      waiting.push(...below.reverse());
    }
  };
  for (const root of children.get("") || []) visit(root);
  for (const instance of instances) visit(instance);
  return ordered;
}

function cell(title, ...content) {
  return element("td", { class: NUMBERS.has(title) ? "number" : "", "data-title": title }, ...content);
}

function drawTaking(taking) {
  if (!taking) return [cell("Weights from", element("span", { class: "soft" }, "not said")), cell("Size"), cell("Time"), cell("Rate")];
  const givers = taking.taken_from.map((giver) => giverWords(giver, true));
  const way = [givers.length ? sourceWords(taking.source) : "", taking.verified ? "checked" : ""].filter(Boolean).join(", ");
  return [
    cell("Weights from",
      element("div", { class: "name" }, givers.length ? givers.join(", ") : sourceWords(taking.source)),
      way ? element("div", { class: "soft" }, way) : "",
      taking.fallback_reason ? element("div", { class: "warn" }, `files were read: ${taking.fallback_reason}`) : ""),
    cell("Size", formatBytes(taking.num_bytes)),
    cell("Time", formatSeconds(taking.seconds)),
    cell("Rate", formatRate(taking.gb_per_s)),
  ];
}

function drawName(instance, depth) {
  const versions = [...new Set(instance.workers.map((worker) => worker.weight_version).filter(Boolean))];
  const name = element("th", { scope: "rowgroup", rowspan: instance.workers.length, "data-title": "Instance" },
    depth ? element("span", { class: "branch", "aria-hidden": "true" }, "└") : "",
    element("span", { class: "name", title: instance.name }, shortName(instance.name)),
    element("div", { class: "soft" },
      instance.host && instance.host !== instance.name ? element("span", {}, `host ${instance.host}`) : "",
      versions.length ? element("span", {}, `version ${versions.join(", ")}`) : "",
      instance.metrics_url ? element("a", { href: instance.metrics_url, target: "_blank", rel: "noopener noreferrer" }, "metrics") : ""));
  name.style.setProperty("--depth", Math.min(depth, 6));
  return name;
}

function drawInstance(instance, depth) {
  const body = element("tbody", {});
  instance.workers.forEach((worker, index) => {
    const row = element("tr", {});
    if (index === 0) row.append(drawName(instance, depth));
    const age = cell("Heartbeat"), load = cell("Load");
    cells.set(`${worker.worker_id}/${worker.worker_rank}`, { age, load });
    const rank = cell("Rank", String(worker.worker_rank), worker.accelerator ? element("span", { class: "soft" }, ` ${worker.accelerator}`) : "");
    rank.title = `worker ${worker.worker_id}`;
    row.append(rank, cell("Status", element("span", { class: `status ${worker.status}` }, STATUS_WORDS[worker.status] || worker.status)),
      age, load, ...drawTaking(worker.taking));
    body.append(row);
  });
  return body;
}

function drawMore(model, numHidden) {
  const button = element("button", { class: "more" }, `Show ${Math.min(FIRST_DRAWN, numHidden)} more of ${numHidden}`);
  button.addEventListener("click", () => {
    numDrawn.set(model.source_id, (numDrawn.get(model.source_id) || FIRST_DRAWN) + FIRST_DRAWN);
    draw(true);
  });
  return button;
}

function drawTable(model) {
  const ordered = lineage(model.instances.filter((instance) => instance.status !== "STALE"));
  const drawn = ordered.slice(0, numDrawn.get(model.source_id) || FIRST_DRAWN);
  if (!drawn.length) return [];
  const columns = COLUMNS.map((title) => element("col", { class: `col-${title.toLowerCase().replace(" ", "-")}` }));
  const heads = COLUMNS.map((title) => element("th", { scope: "col", class: NUMBERS.has(title) ? "number" : "" }, title));
  const table = element("table", {}, element("caption", {}, `Instances of ${model.model_name}`), element("colgroup", {}, ...columns),
    element("thead", {}, element("tr", {}, ...heads)), ...drawn.map(([instance, depth]) => drawInstance(instance, depth)));
  const numHidden = ordered.length - drawn.length;
  return [table, numHidden ? drawMore(model, numHidden) : ""];
}

function drawStale(model) {
  const stale = model.instances.filter((instance) => instance.status === "STALE");
  if (!stale.length) return "";
  const names = stale.slice(-FIRST_DRAWN).map((instance) => element("li", {}, shortName(instance.name),
    instance.host && instance.host !== instance.name ? ` (host ${instance.host})` : ""));
  const left = stale.length - names.length;
  return element("details", { class: "stale-ones", "data-source": model.source_id },
    element("summary", {}, `${stale.length} stale: ended, asleep, or changing their weights`),
    element("ul", {}, ...names, left ? element("li", {}, `and ${left} before these`) : ""));
}

function drawModel(model, claims) {
  const tags = [
    model.role === "target" ? "" : model.role,
    model.revision ? `revision ${model.revision.slice(0, 12)}` : "",
    model.dtype, model.quantization,
    `tp ${model.tensor_parallel_size}`, `pp ${model.pipeline_parallel_size}`,
    model.expert_parallel_size > 1 ? `ep ${model.expert_parallel_size}` : "",
    model.target ? `target ${model.target}` : "",
    model.framework === "SGLANG" ? "" : model.framework,
  ].filter(Boolean);
  return element("section", { class: "model", "aria-label": model.model_name },
    element("div", { class: "head" }, element("h2", {}, model.model_name),
      ...tags.map((tag) => element("span", { class: "tag" }, tag)),
      element("span", { class: "tag", title: "mx_source_id" }, model.source_id), model.role === "target" ? targetButton(model) : ""),
    ...claims.map((claim) => element("div", { class: "claim" }, `◐ ${shortName(claim.instance)} reads the files; others wait for it`)),
    ...drawTable(model), drawStale(model));
}

function showPulse(worker) {
  const shown = cells.get(`${worker.worker_id}/${worker.worker_rank}`);
  if (!shown) return;
  shown.age.textContent = `${formatAge(worker.age_s)} ago`;
  const percent = worker.load === null ? null : Math.round(100 * Math.min(1, Math.max(0, worker.load)));
  const text = percent === null ? "" : `${percent} %`;
  if (shown.load.textContent === text) return;
  const bar = element("span", { class: "track", "aria-hidden": "true" }, element("span", {}));
  bar.firstChild.style.width = `${percent}%`;
  shown.load.replaceChildren(percent === null ? "" : element("span", { class: "load" }, bar, text));
}
