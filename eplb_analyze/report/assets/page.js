"use strict";
/* The page: its text, tables and charts, and what changes when the user selects steps. */

const report = JSON.parse(document.getElementById("data").textContent);

/* ---- helpers */

const byId = (id) => document.getElementById(id);

/* A text with no line break between a figure and its unit. */
const glued = (text) => String(text).replace(/(\d) (?=(?:ms|s|min|h)\b)/g, "$1\u00a0").replace(/(×|\dx) (?=\S)/g, "$1\u00a0");

const say = (id, text) => void (byId(id).textContent = glued(text));

/* Make an element. Strings become text nodes, never markup. */
function element(name, { text, className, title, click, colSpan } = {}, ...children) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = glued(text);
  if (className) made.className = className;
  if (title) made.title = title;
  if (colSpan) made.colSpan = colSpan;
  if (click) made.addEventListener("click", click);
  made.append(...children);
  return made;
}

const figure = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)}%`);
const count = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US", { maximumFractionDigits: 1 }));
/* Round half to even, as Python does. */
const whole = (value) => count(Math.round(value) - value === 0.5 ? 2 * Math.round(value / 2) : Math.round(value));
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const steps = (first, last) => (first === last ? String(first) : `${first} to ${last}`);
const stepsNamed = (first, last) => `step${first === last ? "" : "s"} ${steps(first, last)}`;

/* rank 3; ranks 3 and 5; ranks 1, 3, 5 and 4 more. */
function ranksNamed(ranks, most = 8) {
  if (ranks.length === 1) return `rank ${ranks[0]}`;
  const shown = ranks.slice(0, ranks.length > most ? most : -1).join(", ");
  return `ranks ${shown} and ${ranks.length > most ? `${ranks.length - most} more` : ranks[ranks.length - 1]}`;
}


function signed(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const text = figure(Math.abs(value), digits);
  return Number(text) === 0 ? text : `${value < 0 ? "−" : "+"}${text}`;
}

const glide = () => (matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth");

/* Make a table. A column name that starts with "<" is left-aligned; cells are strings or elements. */
function fill(table, columns, rows) {
  const head = columns.map((name) => element("th", { text: name.replace("<", ""), className: name.startsWith("<") ? "text" : "" }));
  const body = rows.map(({ cells, className, click, title }) => {
    const row = element("tr", { className, click, title });
    cells.forEach((cell, i) => {
      const box = element("td", { className: columns[i].startsWith("<") ? "text" : "" });
      box.append(cell instanceof Node ? cell : glued(cell));
      row.append(box);
    });
    return row;
  });
  table.replaceChildren(element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  return table;
}

/* A cell colored by its load divided by the mean. */
function heat(times) {
  const box = element("span", { text: figure(times, 2), className: "heat" });
  const [red, green, blue] = heatColors()(times);
  box.style.background = `rgb(${red},${green},${blue})`;
  box.style.color = 0.3 * red + 0.59 * green + 0.11 * blue > 135 ? "#111" : "#fff";
  return box;
}

function bar(share) {
  const box = element("span", { className: "bar" }, element("i"));
  box.firstChild.style.width = `${Math.max(0, Math.min(1, share || 0)) * 100}%`;
  return box;
}

/* A sparkline of values over bins, 1 is the mean; selected bins are darker. */
function spark(values, first, last) {
  const [width, height, top] = [132, 22, Math.max(2, ...values.filter((v) => !Number.isNaN(v)))];
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("class", "spark");
  const shape = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    svg.append(made);
  };
  const x = (i) => (i / values.length) * width, y = (v) => height - 1 - (v / top) * (height - 2);
  if (last - first + 1 < values.length)
    shape("rect", { class: "chosen-part", x: x(first), y: 0, width: Math.max(1, x(last + 1) - x(first)), height });
  shape("line", { class: "one", x1: 0, x2: width, y1: y(1), y2: y(1) });
  let path = "", pen = "M";
  values.forEach((value, i) => {
    if (Number.isNaN(value)) return void (pen = "M");
    path += `${pen}${x(i).toFixed(1)} ${y(value).toFixed(1)}H${x(i + 1).toFixed(1)}`;
    pen = "L";
  });
  shape("path", { class: "line", d: path });
  return svg;
}

/* ---- parts of the whole run, drawn once */

function header() {
  const { run } = report.summary;
  byId("title").textContent = report.title;
  const engine = run.engine && `${run.engine}${run.engine_version ? ` ${run.engine_version}` : ""}`;
  const parts = [report.redacted ? "names hidden" : `run ${run.run_id}`, engine, report.imported, report.when,
    report.shape && `${report.shape}, scope ${run.scope}`];
  say("subtitle", parts.filter(Boolean).join(" · "));
  byId("banners").replaceChildren(...report.answer.warnings.map((text) => element("p", { text, className: "banner" })));
  byId("words").replaceChildren(...report.words.map((text) => element("li", { text })));
  say("tokens", report.summary.idle_fraction === null ? "" : report.tokens);
  byId("notes").replaceChildren(...report.notes.map((text) => element("li", { text: `note: ${text}` })));
  say("made", `Written by ${report.program}, ${report.made}.`);
}

/* The same sentences as `summary`: verdict, cost, incidents. A click on an incident selects its steps. */
function answer() {
  const { title, figures, sentences, estimates, evidence, incidents } = report.answer;
  const fields = (parts) => element("dl", {}, ...parts.flatMap(([name, text]) => [element("dt", { text: name }),
    element("dd", {}, name === "next" ? element("code", { text }) : glued(text))]));
  byId("answer").dataset.verdict = report.summary.verdict.verdict;
  byId("verdict").replaceChildren(title, element("span", { text: figures && ` ${figures}`, className: "muted" }));
  byId("verdict").title = report.summary.verdict.rule;
  byId("answer-text").replaceChildren(...[...sentences, ...estimates].map((text) => element("p", { text })), fields(evidence));
  byId("incident-count").textContent = incidents.length ? plural(incidents.length, "incident") : figures && (report.searched || "no incidents");
  byId("incidents").replaceChildren(...incidents.map(({ head, parts }, i) => {
    const { first_step: first, last_step: last } = report.summary.incidents[i];
    return element("div", { className: "incident" },
      element("button", { text: head, className: "quiet", title: "Select these steps", click: () => report.timeline && chooseWithin(first, last) }),
      fields(parts));
  }));
}

function tiles() {
  const { summary } = report, s = summary.balancedness, { steps: seen } = summary;
  const verdicts = {};
  for (const row of report.rearrangements.rearrangements) verdicts[row.verdict] = (verdicts[row.verdict] || 0) + 1;
  const told = Object.entries(verdicts).sort((a, b) => b[1] - a[1]).map(([verdict, n]) => `${n} ${verdict}`);
  const lost = summary.loss && summary.loss.persistent_share;
  const last = summary.hot_experts_steps, excess = `the excess${summary.configurations.length > 1 ? ` in steps ${steps(...last)}` : ""}`;
  const lacking = seen.recorded + seen.incomplete ? seen.incomplete / (seen.recorded + seen.incomplete) : 0;
  const much = report.summary.verdict.verdict === "incomplete_data";
  const unknown = !seen.recorded ? "no complete step" : summary.rollup && summary.rollup.summed ? "not known: sums of single ranks do not show it" : "no complete step has a token";
  const all = [
    ["cost of imbalance", ...report.cost.tile],
    ["balancedness", figure(s.mean), s.mean === null ? unknown : `p5 ${figure(s.p5)}, worst ${figure(s.min)} at step ${s.min_step}`],
    ["idle fraction", percent(summary.idle_fraction), lost === null || lost === undefined ? "by tokens, not by time" : `by tokens; a better placement could remove at most ${percent(lost, 0)} of ${excess}`],
    ["rearrangements", count(report.rearrangements.rearrangements.length), told.join(", ") || (report.not_due ? "none was due" : "")],
    ["complete steps", count(seen.recorded), seen.incomplete ? `${count(seen.incomplete)} incomplete (${percent(lacking)})` : `of ${count(seen.seen)} seen, none incomplete`, much],
    summary.run.scope === "global"
      ? ["ranks", "sum of all", "scope global: one rank writes for all", false]
      : ["ranks that wrote", `${summary.ranks.present} of ${summary.ranks.expected}`, summary.ranks.missing.length ? `missing: ${ranksNamed(summary.ranks.missing)}` : "scope local", summary.ranks.missing.length > 0],
  ];
  byId("tiles").replaceChildren(...all.map(([name, value, text, warn]) =>
    element("div", { className: `card tile${warn ? " warn" : ""}` },
      element("div", { text: name, className: "muted small" }),
      element("div", { text: value, className: "value" }),
      element("div", { text, className: "muted small" }))));
}

function cost() {
  byId("cost").hidden = report.summary.idle_fraction === null;
  say("cost-text", report.cost.text);
  if (report.cost.rows.length)
    fill(byId("cost-table"), ["<phase", "steps", "median step", "cost per step", "of step time", "R²", "<"],
      report.cost.rows.map((cells) => ({ cells })));
}

function completeness() {
  const { steps: seen, ranks, duration_seconds: seconds } = report.summary;
  const names = { recorded: "recorded by all ranks", dummy: "without real tokens (dummy)", not_sampled: "not sampled",
    dropped: "dropped: the queue was full", rejected: "rejected by the writer", incomplete: "incomplete: a rank is missing",
    missing: "seen by no rank" };
  const rows = Object.entries(names).filter(([key]) => seen[key] || key === "recorded" || key === "incomplete")
    .map(([key, name]) => ({ cells: [name, count(seen[key])], className: seen[key] && ["dropped", "rejected", "incomplete", "missing"].includes(key) ? "bad" : "" }));
  const what = fill(element("table"), [`<${seen.first === null ? "steps" : stepsNamed(seen.first, seen.last)}`, "steps"], rows);
  const facts = [
    ["ranks expected", count(ranks.expected)],
    ["ranks that wrote", count(ranks.present)],
    ["ranks missing", ranks.missing.length ? ranksNamed(ranks.missing, 32) : "none"],
    ["duration", seconds === null ? "not known" : duration(seconds)],
    ["why steps are incomplete", report.incomplete || "–"],
    ["steps that no rank saw", report.gaps.length ? report.gaps.map(([a, b]) => steps(a, b)).join("; ") : "none"],
  ].map((cells) => ({ cells }));
  byId("complete-tables").replaceChildren(...[what, fill(element("table"), ["<", "<"], facts)]
    .map((table) => element("div", { className: "scroll" }, table)));
  byId("findings").replaceChildren(...report.findings.map(({ severity, code, text }) =>
    element("li", { className: severity },
      element("b", { text: `${severity}: ` }), glued(text || `${code} (the text may name files or hosts and is left out)`))));
}

function duration(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]])
    if (seconds >= 2 * size) return `${(seconds / size).toFixed(1)} ${unit}`;
  return `${seconds.toFixed(1)} s`;
}

function meanings() {
  byId("meanings-list").replaceChildren(...report.meanings.flatMap(({ name, formula, text }) => [
    element("dt", {}, name, element("code", { text: formula })), element("dd", { text })]));
}

/* ---- selection of steps */

const state = { first: 0, last: 0, layer: 0, slots: true, shown: report.top };
let loads, line, rankMap, expertMap, layerMap;

const bins = () => report.timeline.bins;
const isWhole = () => state.first === 0 && state.last === bins().length - 1;

/* Select bins. settled: the frame is not being dragged, so it snaps to their edges. */
function choose(first, last, settled = true) {
  [state.first, state.last] = [first, last];
  if (settled) line.choose(chosenSteps());
  later();
}

/* The selected steps [from, to); null: the whole run. */
function chosenSteps() {
  return isWhole() ? null : [bins()[state.first].first_step, bins()[state.last].last_step + 1];
}

/* Select the bins whose middles are in steps [from, to), at least one. */
function chooseSteps(from, to, settled = true) {
  const inside = bins().map((bin, i) => [(bin.first_step + bin.last_step + 1) / 2, i])
    .filter(([middle]) => middle >= from && middle < to).map(([, i]) => i);
  const nearest = bins().findIndex((bin) => (from + to) / 2 <= bin.last_step + 1);
  if (!inside.length) inside.push(nearest < 0 ? bins().length - 1 : nearest);
  choose(inside[0], inside[inside.length - 1], settled);
}

/* The bins that lie completely in a rearrangement's window, or else those nearest to it. */
function chooseWithin(first, last) {
  const inside = bins().map((bin, i) => (bin.first_step >= first && bin.last_step <= last ? i : -1)).filter((i) => i >= 0);
  if (inside.length) choose(inside[0], inside[inside.length - 1]);
  else chooseSteps(first, last + 1);
  byId("over-time").scrollIntoView({ behavior: glide() });
}

let waiting = false;
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawChosen();
  });
}

function drawChosen() {
  const { first, last } = state, part = bins().slice(first, last + 1);
  byId("from").value = part[0].first_step;
  byId("to").value = part[part.length - 1].last_step;
  byId("whole").disabled = isWhole();
  byId("earlier").disabled = first === 0;
  byId("later").disabled = last === bins().length - 1;
  const known = part.filter((bin) => bin.mean !== null), n = known.reduce((sum, bin) => sum + bin.steps, 0);
  const inMaps = loads.steps.slice(first, last + 1).reduce((sum, k) => sum + k, 0);
  const mean = n ? known.reduce((sum, bin) => sum + bin.mean * bin.steps, 0) / n : null;
  const apart = inMaps < n ? `; maps: ${plural(inMaps, "step")} of the last configuration` : "";
  say("chosen-text", `${plural(n, "complete step")} with tokens · balancedness ${figure(mean)}${apart}`);
  byId("chosen").classList.toggle("part", !isWhole());
  const bySlot = loads.bySlot(first, last), byRank = loads.byRank(bySlot), byExpert = loads.byExpert(first, last);
  Object.assign(state, { bySlot, byRank, byExpert });
  state.timesRank = timesMean(byRank, loads.rows, (rank) => !loads.lost.has(rank));
  state.timesSlot = timesMean(bySlot, loads.rows, (slot) => !loads.lost.has(loads.rankOf(slot)));
  state.timesExpert = timesMean(byExpert, loads.rows);
  drawMaps();
  drawLayer();
  drawHot();
}

const ranksOf = (placed, expert) => {
  const found = [];
  if (placed) placed.forEach((e, slot) => e === expert && found.push(slot));
  return found;
};

function drawMaps() {
  const rows = loads.layers.map(String);
  const click = (row) => pickLayer(row);
  rankMap.show({
    values: state.timesRank, rows, columns: [...Array(loads.ranks).keys()].map(String), columnName: "EP rank", rowName: "layer",
    group: report.summary.run.ranks_per_node || 0, labels: true, click, tip: rankTip,
  });
  const slots = state.slots;
  expertMap.show({
    values: slots ? state.timesSlot : state.timesExpert, rows, rowName: "layer", labels: true, click,
    columns: [...Array(slots ? loads.slots : loads.experts).keys()].map(String),
    columnName: slots ? `slot, ${loads.perRank} on each EP rank` : "logical expert",
    group: slots ? loads.perRank : 0, tip: slots ? slotTip : expertTip,
  });
}

function drawLayer() {
  const over = loads.rankOverTime(state.layer), { bins: n, ranks, lost } = loads;
  const serving = [...Array(ranks).keys()].filter((rank) => !lost.has(rank));
  const times = new Float64Array(over.length);
  for (let b = 0; b < n; b++) {
    let total = 0;
    for (let r = 0; r < ranks; r++) total += over[r * n + b];
    for (let r = 0; r < ranks; r++)
      times[r * n + b] = total > 0 && !lost.has(r) ? (over[r * n + b] * serving.length) / total : NaN;
  }
  layerMap.show({
    values: times, rows: [...Array(ranks).keys()].map(String), columns: bins().map((bin) => String(bin.first_step)),
    columnName: "step", rowName: "EP rank", group: 0, labels: false, height: 340, frame: isWhole() ? null : [state.first, state.last],
    click: (row, b) => choose(b, b),
    tip: (rank, b) => [
      [`Layer ${loads.layers[state.layer]}, rank ${rank}`, "head"],
      [`${stepsNamed(bins()[b].first_step, bins()[b].last_step)}, ${plural(loads.steps[b], "complete step")}`],
      [loads.steps[b] ? tokensOf(over[rank * n + b], times[rank * n + b], "rank", rank) : "not known"],
    ],
  });
  const empty = loads.steps.includes(0);
  byId("layer-unknown").hidden = !times.some(Number.isNaN);
  say("layer-unknown-text", [
    empty && (report.timeline.configurations.length > 1 ? "no complete step of the last configuration" : "no complete step"),
    loads.steps.some((k, b) => k > 0 && Number.isNaN(times[serving[0] * n + b])) && "no token in this layer",
    lost.size > 0 && "a lost rank",
  ].filter(Boolean).join(", or "));
}

function pickLayer(row) {
  state.layer = row;
  byId("layer").value = String(row);
  drawLayer();
}

/* ---- tooltips */

function timesOf(value, of) {
  return Number.isNaN(value) ? "no token in this layer" : `${figure(value, 2)}x the layer's mean ${of}`;
}

function tokensOf(load, times, of, rank) {
  return loads.lost.has(rank) ? "the rank is lost" : `${count(load)} tokens, ${timesOf(times, of)}`;
}

function rankTip(row, rank) {
  const i = row * loads.ranks + rank, placed = loads.placement(state.last, row);
  const lines = [[`Layer ${loads.layers[row]}, rank ${rank}`, "head"],
    [tokensOf(state.byRank[i], state.timesRank[i], "rank", rank)]];
  if (placed && !loads.lost.has(rank)) {
    const own = [...placed.subarray(rank * loads.perRank, (rank + 1) * loads.perRank)];
    lines.push([`experts ${own.map((e) => (e === Loads.NOBODY ? "empty" : e)).slice(0, 24).join(", ")}${own.length > 24 ? " …" : ""}${moved(row)}`]);
  }
  return lines;
}

function slotTip(row, slot) {
  const i = row * loads.slots + slot, placed = loads.placement(state.last, row);
  const expert = placed ? placed[slot] : null;
  const lines = [[`Layer ${loads.layers[row]}, slot ${slot} on rank ${loads.rankOf(slot)}`, "head"],
    [tokensOf(state.bySlot[i], state.timesSlot[i], "slot", loads.rankOf(slot))]];
  if (loads.lost.has(loads.rankOf(slot))) return lines;
  if (expert === null) lines.push(["whose slot it is, is not known"]);
  else if (expert === Loads.NOBODY) lines.push([`empty slot${moved(row)}`]);
  else lines.push([`logical expert ${expert}${moved(row)}`], ...expertLines(row, expert));
  return lines;
}

function expertTip(row, expert) {
  const i = row * loads.experts + expert;
  return [[`Layer ${loads.layers[row]}, logical expert ${expert}`, "head"],
    [`${count(state.byExpert[i])} tokens, ${timesOf(state.timesExpert[i], "expert")}`], ...expertLines(row, expert, true)];
}

function expertLines(row, expert, alone = false) {
  const i = row * loads.experts + expert, placed = loads.placement(state.last, row), own = ranksOf(placed, expert);
  const share = state.timesExpert[i] / loads.experts;
  const all = `${percent(share, 2)} of the layer's tokens`;
  const lines = [[alone ? all : `the expert has ${all}, ${figure(state.timesExpert[i], 2)}x the mean expert`]];
  if (placed) {
    const where = [...new Set(own.map((slot) => loads.rankOf(slot)))];
    lines.push([`${plural(own.length, "replica")}, on rank${where.length === 1 ? "" : "s"} ${where.join(", ")}; due: ${figure(share * loads.filled(placed), 1)}${alone ? moved(row) : ""}`]);
  }
  const flags = flagsOf(row, expert);
  if (flags) lines.push([`over all steps: ${flags}`, "muted"]);
  return lines;
}

function moved(row) {
  return loads.changed(state.first, state.last, row) ? " (at the end of these steps)" : "";
}

/* An expert's verdict over all steps, as in `experts`; a selection is too short to tell bursts. */
const FLAGS = { under_replicated: "under-replicated", over_replicated: "over-replicated", replicas_on_one_rank: "two replicas share a rank" };
function flagsOf(row, expert) {
  if (!report.experts) return "";
  const code = report.experts.flags[row][expert], names = report.experts.flag_names;
  const told = [["", "hot in bursts", report.experts.windows > 1 ? "always hot" : "hot"][code & 3]];
  names.forEach((name, bit) => code & (4 << bit) && told.push(FLAGS[name] || name));
  return told.filter(Boolean).join(", ");
}

/* ---- tables */

function drawHot() {
  const known = report.experts !== null;
  byId("hot").hidden = !known;
  if (!known) return;
  const { first, last, timesExpert } = state;
  const order = [...timesExpert.keys()].filter((i) => state.byExpert[i] > 0).sort((a, b) => timesExpert[b] - timesExpert[a] || a - b);
  const over = new Map();
  const history = (row, expert) => {
    if (!over.has(row)) over.set(row, timesMean(loads.expertsOverTime(row), loads.bins));
    return Array.from({ length: loads.bins }, (_, b) => over.get(row)[b * loads.experts + expert]);
  };
  const rows = order.slice(0, state.shown).map((i) => {
    const row = Math.floor(i / loads.experts), expert = i % loads.experts;
    const placed = loads.placement(last, row), own = ranksOf(placed, expert), share = timesExpert[i] / loads.experts;
    const due = placed && share * loads.filled(placed), short = placed && due - own.length >= 1;
    const where = [...new Set(own.map((slot) => loads.rankOf(slot)))];
    return {
      click: () => pickLayer(row), title: "Show this layer over time",
      cells: [loads.layers[row], expert, percent(share, 2), heat(timesExpert[i]), count(state.byExpert[i]),
        placed ? own.length : "–", element("span", { text: `${figure(due, 1)}${short ? " !" : ""}`, className: short ? "bad" : "" }),
        where.length ? where.slice(0, 12).join(", ") + (where.length > 12 ? " …" : "") : "–",
        spark(history(row, expert), first, last), flagsOf(row, expert) || "–"],
    };
  });
  fill(byId("hot-table"), ["layer", "expert", "share", "x mean", "tokens", "replicas", "due", "<on ranks", "<x mean over the run", "<over all steps"], rows);
  byId("more").hidden = order.length <= state.shown;
  say("hot-text", `The experts with the largest share of their layer's tokens, out of ${count(report.experts.counts.experts)}. Replicas and ranks: at the end of the selected steps. Due: the replicas that the share justifies (!: one or more are missing). The last column covers all steps${report.experts.windows > 1 ? `, in windows of ${count(report.experts.window)}` : ""}.`);
}

function drawRearrangements() {
  const { rearrangements: rows, confidence, window: around } = report.rearrangements;
  byId("rearrangements-table").hidden = !rows.length;
  if (!rows.length) {
    say("rearrangements-text", report.not_due || "No rearrangement is known in these steps.");
    return;
  }
  say("rearrangements-text", `Mean balancedness of up to ${count(around)} complete steps before and after, with the ${percent(confidence, 0)} interval of the gain. ${report.loads ? "Click before or after to see the maps of these steps." : ""}`);
  const view = (side) => (side.first_step === null || !report.loads ? figure(side.balancedness)
    : element("button", { className: "link", text: figure(side.balancedness), title: `Select ${stepsNamed(side.first_step, side.last_step)}`,
      click: () => chooseWithin(side.first_step, side.last_step) }));
  fill(byId("rearrangements-table"),
    ["<steps", "<verdict", "before", "predicted", "after", "gain", "interval", "<half of it lasted", "layers", "slots moved", "to other ranks", "to other nodes", "<"],
    rows.map((row) => ({
      cells: [steps(row.first_step, row.last_step),
        element("span", { text: row.verdict, className: `badge ${verdictColor(row.verdict).slice(2)}` }),
        view(row.before), figure(row.predicted), view(row.after), signed(row.gain),
        row.gain_low === null ? "–" : `${signed(row.gain_low)} … ${signed(row.gain_high)}`,
        row.lasted === null ? "–" : `${row.lasted.until === "half gone" ? "" : "≥ "}${plural(row.lasted.steps, "step")}`,
        row.layers, count(row.slots_moved), count(row.experts_crossed_ranks), count(row.experts_crossed_nodes), row.reason || ""],
    })));
}

function pickRearrangement(index) {
  const rows = byId("rearrangements-table").tBodies[0].rows;
  for (const row of rows) row.classList.remove("picked");
  rows[index].classList.add("picked");
  rows[index].scrollIntoView({ behavior: glide(), block: "center" });
}

function drawLost() {
  const { summary, ranks } = report, { loss } = summary;
  byId("lost").hidden = !summary.layers.length;
  if (!summary.layers.length) return;
  const top = report.top;
  say("lost-text", "In each step and layer, all ranks wait for the slowest. Its tokens above the mean are excess tokens and are attributed to it.");
  const part = (title, table) => element("div", {}, element("h3", { text: title }), element("div", { className: "scroll" }, table));
  const worst = [...summary.layers].filter((l) => l.balancedness !== null).sort((a, b) => a.balancedness - b.balancedness || a.layer - b.layer);
  const parts = [part(`Worst layers (${Math.min(top, worst.length)} of ${worst.length})`,
    fill(element("table"), ["layer", "balancedness", "<", "imbalance", "slowest rank", "in steps"], worst.slice(0, top).map((l) => ({
      click: report.loads && (() => toLayer(l.layer)), title: "Show this layer over time",
      cells: [l.layer, figure(l.balancedness), bar(l.balancedness), figure(l.imbalance), l.worst_rank === null ? "–" : l.worst_rank, percent(l.worst_rank_share, 0)] }))))];
  if (ranks) {
    const cost = [...ranks.ranks].sort((a, b) => b.excess_tokens - a.excess_tokens || a.rank - b.rank);
    parts.push(part(`Ranks that the others wait for (${Math.min(top, cost.length)} of ${cost.length})`,
      fill(element("table"), ["rank", "x mean", "slowest in", "of all excess", "<"], cost.slice(0, top).map((r) => ({
        cells: [r.rank, figure(r.times_mean), percent(r.slowest_share), percent(r.excess_share), bar(r.excess_share)] })))));
  }
  if (loss && loss.stretches.length)
    parts.push(part("Worst periods", fill(element("table"), ["layer", "rank", "<steps", "excess tokens", "of all excess"],
      loss.stretches.slice(0, top).map((s) => ({
        click: report.loads && (() => { toLayer(s.layer); chooseSteps(s.first_step, s.last_step + 1); }), title: "Show this layer and select these steps",
        cells: [s.layer, s.rank, steps(s.first_step, s.last_step), whole(s.excess_tokens), percent(s.share)] })))));
  if (summary.phases.length)
    parts.push(part("Phases", fill(element("table"), ["<phase", "steps", "balancedness", "idle"],
      summary.phases.map((p) => ({ cells: [p.phase, count(p.steps), figure(p.balancedness), percent(p.idle_fraction)] })))));
  if (summary.configurations.length > 1)
    parts.push(part("Configurations (sums never combine two of them)", fill(element("table"), ["<steps", "EP", "slots", "recorded", "balancedness", "idle"],
      summary.configurations.map((c) => ({ cells: [steps(c.first_step, c.last_step), c.ep_size, c.num_physical_experts, count(c.recorded), figure(c.balancedness), percent(c.idle_fraction)] })))));
  byId("lost-tables").replaceChildren(...parts);
}

function toLayer(number) {
  pickLayer(loads.layers.indexOf(number));
  byId("layer-section").scrollIntoView({ behavior: glide(), block: "center" });
}

/* ---- charts over time */

function drawTimeline() {
  const changes = report.timeline.configurations.slice(1).map((c, i) => ({
    step: c.first_step, text: `EP ${report.timeline.configurations[i].ep_size} → ${c.ep_size}, ${c.num_physical_experts} slots` }));
  const rows = report.rearrangements.rearrangements;
  line.show({
    bins: bins(), changes, click: pickRearrangement,
    marks: rows.map((row) => ({ step: row.first_step, verdict: row.verdict })),
    markTip: (i) => [[`Rearrangement at step ${steps(rows[i].first_step, rows[i].last_step)}`, "head"], [rows[i].verdict],
      [`before ${figure(rows[i].before.balancedness)}, after ${figure(rows[i].after.balancedness)}, gain ${signed(rows[i].gain)}`],
      ["click to see it in the table", "muted"]],
    tip: (b) => {
      const bin = bins()[b], time = loads.times[b];
      const lines = [[`S${stepsNamed(bin.first_step, bin.last_step).slice(1)}`, "head"]];
      lines.push([bin.mean === null ? "no complete step" : `balancedness ${figure(bin.mean)}, ${figure(bin.min)} to ${figure(bin.max)}`]);
      lines.push([`${plural(bin.steps, "complete step")} with tokens`]);
      if (time !== null && !report.imported) lines.push([`from ${new Date(time).toISOString().replace("T", " ").slice(0, 19)} UTC`, "muted"]);
      return lines;
    },
  });
  line.choose(chosenSteps());
}

/* Typed steps snap to the edges of bins, so the width of a bin is shown beside the field. */
function binWidths() {
  const widths = bins().map((bin) => bin.last_step - bin.first_step + 1);
  const [least, most] = [Math.min(...widths), Math.max(...widths)];
  say("bins", most > 1 ? `in bins of ${least === most ? least : `${least} or ${most}`} steps` : "");
  byId("gaps").hidden = bins().every((bin) => bin.mean !== null);
}

/* ---- light and dark, size, print */

const dark = matchMedia("(prefers-color-scheme: dark)");
let wanted = null; // the setting of the switch; null: follow the system

function setTheme() {
  const theme = wanted || (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = theme === "dark" ? "☀ light" : "☾ dark";
}

function redraw() {
  setTheme();
  drawLost();
  if (!loads) return;
  drawTimeline();
  drawChosen();
}

const charts = () => [line, rankMap, expertMap, layerMap].filter(Boolean).map((c) => c.chart);

function listen() {
  byId("theme").addEventListener("click", () => {
    wanted = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    redraw();
  });
  dark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    [state.wantedBefore, wanted] = [wanted, "light"];
    redraw();
    charts().forEach((chart) => chart.resize());
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    wanted = state.wantedBefore;
    redraw();
    charts().forEach((chart) => chart.resize());
  });
  if (!loads) return;
  addEventListener("scroll", () => tip.hide(), { passive: true });
  new ResizeObserver(() => charts().forEach((chart) => chart.resize())).observe(byId("charts"));
  const typed = () => {
    const [from, to] = [Number(byId("from").value), Number(byId("to").value)];
    chooseSteps(Math.min(from, to), Math.max(from, to) + 1);
  };
  for (const id of ["from", "to"]) byId(id).addEventListener("change", typed);
  const shift = (direction) => {
    const width = state.last - state.first + 1, most = bins().length - width;
    const first = Math.max(0, Math.min(most, state.first + direction * width));
    choose(first, first + width - 1);
  };
  byId("earlier").addEventListener("click", () => shift(-1));
  byId("later").addEventListener("click", () => shift(1));
  byId("whole").addEventListener("click", () => choose(0, bins().length - 1));
  byId("more").addEventListener("click", () => {
    state.shown += report.top;
    drawHot();
  });
  byId("layer").addEventListener("change", (event) => pickLayer(Number(event.target.value)));
  for (const [id, slots] of [["by-slot", true], ["by-expert", false]])
    byId(id).addEventListener("click", () => {
      state.slots = slots;
      byId("by-slot").setAttribute("aria-pressed", String(slots));
      byId("by-expert").setAttribute("aria-pressed", String(!slots));
      drawMaps();
    });
}

async function start() {
  setTheme();
  header();
  answer();
  tiles();
  cost();
  completeness();
  meanings();
  drawRearrangements();
  drawLost();
  byId("charts").hidden = !report.loads;
  if (report.loads) {
    loads = await Loads.of(report.loads);
    state.last = bins().length - 1;
    byId("layer").replaceChildren(...loads.layers.map((number, row) => {
      const option = element("option", { text: String(number) });
      option.value = String(row);
      return option;
    }));
    const worst = [...report.summary.layers].filter((l) => l.balancedness !== null).sort((a, b) => a.balancedness - b.balancedness)[0];
    state.layer = worst ? loads.layers.indexOf(worst.layer) : 0;
    byId("layer").value = String(state.layer);
    binWidths();
    byId("maps").classList.toggle("stacked", loads.ranks > 96);
    line = new Timeline(byId("timeline"), (range, done) =>
      (range ? chooseSteps(...range, done) : choose(0, bins().length - 1)));
    rankMap = new HeatMap(byId("ranks-map"));
    expertMap = new HeatMap(byId("experts-map"));
    layerMap = new HeatMap(byId("layer-map"));
    drawTimeline();
    drawChosen();
  }
  listen();
  document.documentElement.dataset.ready = "true";
}

start();
