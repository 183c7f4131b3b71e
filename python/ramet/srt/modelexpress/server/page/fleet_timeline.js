// Owns the graph of who took weights from whom: one wave of loads at a time, each load a bar on the axis of time.
"use strict";

const WAVE_PAUSE_S = 60; // loads that come so long after all before them are another wave
const FIRST_BARS = 20; // of a wave
const MIN_BAR_PERCENT = 0.4;

let loads = [], numLoads = 0, waveFromEnd = 0, numBars = FIRST_BARS;

// The ranks of an instance that load at the same time are one load: its bytes are theirs together.
function joinRanks(all) {
  const joined = new Map();
  for (const load of all) {
    const started = load.ended_at - load.taking.seconds;
    const key = `${load.model_name}\n${load.instance}\n${load.weight_version}`;
    const last = joined.get(key);
    const open = last && last.length && started <= last[last.length - 1].ended ? last[last.length - 1] : null;
    const one = open || { model: load.model_name, instance: load.instance, version: load.weight_version, started, ended: load.ended_at, bytes: 0, ways: new Set(), givers: new Map(), numRanks: 0 };
    one.started = Math.min(one.started, started);
    one.ended = Math.max(one.ended, load.ended_at);
    one.bytes += load.taking.num_bytes;
    one.numRanks += 1;
    one.ways.add(sourceWords(load.taking.source) + (load.taking.verified ? ", checked" : ""));
    for (const giver of load.taking.taken_from) {
      const name = giverWords(giver, false);
      one.givers.set(name, (one.givers.get(name) || 0) + (giver.num_bytes || 0));
    }
    if (!open) joined.set(key, [...(last || []), one]);
  }
  return [...joined.values()].flat().sort((a, b) => a.started - b.started || a.ended - b.ended);
}

function cutIntoWaves(joined) {
  const waves = [];
  let ended = -Infinity;
  for (const one of joined) {
    if (one.started > ended + WAVE_PAUSE_S) waves.push([]);
    waves[waves.length - 1].push(one);
    ended = Math.max(ended, one.ended);
  }
  return waves;
}

function rateWords(one) {
  const seconds = one.ended - one.started;
  return seconds > 0 ? formatRate(one.bytes / seconds / 1e9) : "";
}

function drawBar(one, start, span) {
  const givers = [...one.givers].map(([name, bytes]) => `${name}${bytes ? ` (${formatBytes(bytes)})` : ""}`);
  const label = element("div", { class: "bar-label" },
    element("span", { class: "name" }, shortName(one.instance)),
    element("span", { class: "soft" }, givers.length ? `← ${givers.join(", ")}` : [...one.ways].join("; ")));
  const figures = [formatBytes(one.bytes), formatSeconds(one.ended - one.started), rateWords(one)].filter(Boolean).join(" · ");
  const details = [formatClock(one.started), givers.length ? [...one.ways].join("; ") : "", one.version ? `version ${one.version}` : "",
    one.numRanks > 1 ? `${one.numRanks} ranks` : ""].filter(Boolean).join(" · ");
  const bar = element("span", { class: `bar ${givers.length ? "taken" : "read"}` });
  const left = (100 * (one.started - start)) / span;
  bar.style.left = `${Math.min(left, 100 - MIN_BAR_PERCENT)}%`;
  bar.style.width = `${Math.max(MIN_BAR_PERCENT, (100 * (one.ended - one.started)) / span)}%`;
  return element("li", { title: one.model }, label, element("div", { class: "lane" }, bar),
    element("div", { class: "bar-figures" }, element("span", {}, figures), element("span", { class: "soft" }, details)));
}

// From each giver's row to the row of who took from it, at the moment when that began. Rows are one unit high.
function drawLinks(bars, start, span) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 100 ${bars.length}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("class", "links");
  svg.setAttribute("aria-hidden", "true");
  const rows = new Map(); // of who has been drawn so far
  bars.forEach((one, row) => {
    const x = (100 * (one.started - start)) / span;
    for (const giver of one.givers.keys()) {
      if (!rows.has(giver)) continue;
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      line.setAttribute("d", `M ${x} ${rows.get(giver) + 0.5} V ${row + 0.5}`);
      svg.append(line);
    }
    rows.set(shortName(one.instance), row);
  });
  return svg;
}

function drawAxis(start, span) {
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => element("span", {}, share ? `+${formatSeconds(share * span)}` : formatClock(start)));
  return element("div", { class: "axis", "aria-hidden": "true" }, element("div", { class: "ticks" }, ...ticks));
}

function drawWaveHead(waves, wave, start, ended) {
  const move = (text, step, title) => {
    const button = element("button", { "aria-label": title, class: "step" }, text);
    const next = waveFromEnd + step;
    button.disabled = next < 0 || next >= waves.length;
    button.addEventListener("click", () => { waveFromEnd = next; numBars = FIRST_BARS; drawTimeline(); });
    return button;
  };
  const bytes = wave.reduce((sum, one) => sum + one.bytes, 0);
  const words = `${formatClock(start, true)}: ${wave.length} ${wave.length === 1 ? "load" : "loads"}, ${formatBytes(bytes)} in ${formatSeconds(ended - start)}`;
  return element("div", { class: "head" }, element("h2", {}, "Who took weights from whom"),
    element("span", {}, move("‹", 1, "Earlier loads"), " ", move("›", -1, "Later loads")), element("span", { class: "soft" }, words));
}

function drawTimeline() {
  const words = filterWords();
  const joined = joinRanks(loads).filter((one) => matches(words, [one.model, one.instance, one.version, ...one.givers.keys()]));
  const waves = cutIntoWaves(joined);
  byId("timeline").hidden = !waves.length;
  if (!waves.length) return;
  waveFromEnd = Math.min(waveFromEnd, waves.length - 1);
  const wave = waves[waves.length - 1 - waveFromEnd];
  const start = wave[0].started, ended = Math.max(...wave.map((one) => one.ended)), span = Math.max(ended - start, 1e-3);
  const bars = wave.slice(0, numBars);
  const list = element("ol", { class: "bars" }, ...bars.map((one) => drawBar(one, start, span)));
  const more = element("button", { class: "more" }, `Show ${Math.min(FIRST_BARS, wave.length - bars.length)} more of ${wave.length - bars.length}`);
  more.addEventListener("click", () => { numBars += FIRST_BARS; drawTimeline(); });
  byId("timeline").replaceChildren(drawWaveHead(waves, wave, start, ended), drawAxis(start, span),
    element("div", { class: "graph" }, list, element("div", { class: "links-box" }, drawLinks(bars, start, span))), wave.length > bars.length ? more : "");
}
