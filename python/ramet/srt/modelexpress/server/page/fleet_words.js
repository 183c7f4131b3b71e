// Owns how elements are made, and how numbers and words are written.
"use strict";

const STATUS_WORDS = { READY: "● ready", INITIALIZING: "◐ starting", STALE: "○ stale", SILENT: "▲ silent", UNKNOWN: "? unknown" };
const SOURCE_WORDS = {
  checkpoint: "from files", dummy: "made up", transfer_engine: "over the network", nccl: "broadcast",
  local_map: "shared memory", local_copy: "copied on the host", tensors: "tensors of a trainer", delta: "a delta",
};

const byId = (id) => document.getElementById(id);

function element(name, properties, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties || {})) {
    if (key === "class") node.className = value; else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

function formatBytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (count >= 1000 && power < units.length - 1) { count /= 1000; power += 1; }
  return `${power && count < 100 ? count.toPrecision(3) : Math.round(count)} ${units[power]}`;
}

function formatSeconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 100) return `${value.toPrecision(3)} s`;
  return formatAge(value);
}

function formatAge(value) {
  if (value < 120) return `${Math.floor(value)} s`;
  if (value < 7200) return `${Math.floor(value / 60)} min`;
  return `${Math.floor(value / 3600)} h`;
}

function formatRate(gbPerS) {
  return gbPerS === null ? "" : gbPerS < 0.1 ? `${(gbPerS * 1000).toPrecision(2)} MB/s` : `${gbPerS.toPrecision(3)} GB/s`;
}

function formatClock(unixSeconds, withDay) {
  const date = new Date(unixSeconds * 1000);
  return withDay ? `${date.toLocaleDateString()} ${date.toLocaleTimeString()}` : date.toLocaleTimeString();
}

function shortName(name) {
  return name.replace(/^https?:\/\//, "");
}

function sourceWords(source) {
  return source.split("+").map((part) => SOURCE_WORDS[part] || part).join(" + ");
}

function giverWords(giver, withRank) {
  if (!giver.instance) return "an instance that has gone";
  return shortName(giver.instance) + (withRank && giver.worker_rank !== null ? ` rank ${giver.worker_rank}` : "");
}
