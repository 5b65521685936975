"use strict";
/* Charts: a heat map and a line over time, drawn with ECharts; page.js provides the data. */

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function channels(hex) {
  return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

/* The color of a load divided by the mean, as in a terminal: blue below 1, pale at 1, red from 2. */
function heatColors() {
  const [cold, mean, hot, unknown] = ["--cold", "--mean", "--hot", "--unknown"].map((n) => channels(color(n)));
  return (times) => {
    if (Number.isNaN(times)) return unknown;
    const [low, high, t] = times <= 1 ? [cold, mean, Math.max(0, times)] : [mean, hot, Math.min(1, times - 1)];
    return low.map((c, i) => Math.round(c + (high[i] - c) * t));
  };
}

/* ---- pointer and tooltips */

const tip = {
  show(lines, event) {
    const box = document.getElementById("tip");
    box.replaceChildren(...lines.map(([text, kind]) => element("div", { className: kind || "", text })));
    box.hidden = false;
    const { clientX: x, clientY: y } = event;
    const { offsetWidth: width, offsetHeight: height } = box;
    box.style.left = `${x + 18 + width > innerWidth ? Math.max(4, x - width - 14) : x + 18}px`;
    box.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px`;
  },
  hide() {
    document.getElementById("tip").hidden = true;
  },
};

/* ---- heat map

   map.show({values, columns, rows, group, labels, tip, click, frame, height}): values, Float64Array
   [rows × columns], are times the mean, NaN: not known; columns and rows are the axes' labels, group is so
   many columns that belong together, frame is [first, last] column to mark. */

class HeatMap {
  constructor(box) {
    this.box = box;
    this.chart = echarts.init(box, null, { renderer: "canvas" });
    const zr = this.chart.getZr();
    zr.on("mousemove", (e) => this._point(e));
    zr.on("globalout", () => tip.hide());
    zr.on("click", (e) => {
      const cell = this._cell(e);
      if (cell && this.data.click) this.data.click(...cell);
    });
    zr.on("dblclick", () => this.unzoom());
  }

  show(data) {
    const before = this.data;
    this.data = data;
    const rows = data.rows.length;
    const height = Math.round(Math.min(30, Math.max(9, (data.height || 600) / rows)) * rows) + 64;
    if (this.box.style.height !== `${height}px`) {
      this.box.style.height = `${height}px`;
      this.chart.resize();
    }
    const same = before && before.columns.length === data.columns.length && before.columnName === data.columnName;
    if (same && this._theme === document.documentElement.dataset.theme) {
      this.chart.setOption({ xAxis: { data: data.columns }, series: [{ data: [[0, 0]] }] });
    } else {
      this._theme = document.documentElement.dataset.theme;
      this.chart.setOption(this._option(), true);
      this.chart.dispatchAction({ type: "takeGlobalCursor", key: "dataZoomSelect", dataZoomSelectActive: true });
    }
  }

  unzoom() {
    for (const dataZoomIndex of [0, 1, 2, 3])
      this.chart.dispatchAction({ type: "dataZoom", dataZoomIndex, start: 0, end: 100 });
  }

  _option() {
    const { columns, rows, columnName, rowName } = this.data;
    const [ink, line] = [color("--muted"), color("--line")];
    const axis = {
      type: "category",
      axisTick: { show: false },
      axisLine: { lineStyle: { color: line } },
      axisLabel: { color: ink, fontSize: 11, hideOverlap: true },
      nameTextStyle: { color: ink, fontSize: 11 },
      nameLocation: "middle",
      splitLine: { show: false },
    };
    const slider = {
      type: "slider", filterMode: "none", showDetail: false, brushSelect: false, borderColor: "transparent",
      fillerColor: color("--filler"), backgroundColor: color("--track"), showDataShadow: false,
      handleStyle: { color: color("--card"), borderColor: ink }, moveHandleSize: 0,
    };
    const inside = {
      type: "inside", filterMode: "none", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false,
      moveOnMouseMove: "shift", preventDefaultMouseMove: false,
    };
    return {
      animation: false,
      grid: { left: 48, right: 30, top: 4, bottom: 60 },
      // Needed so that dragging zooms; its icons are hidden.
      toolbox: { left: -200, feature: { dataZoom: { filterMode: "none",
        brushStyle: { color: color("--filler"), borderColor: color("--accent"), borderWidth: 1 } } } },
      xAxis: { ...axis, data: columns, name: columnName, nameGap: 24 },
      yAxis: { ...axis, data: rows, name: rowName, nameGap: 32, inverse: true },
      dataZoom: [
        { ...slider, xAxisIndex: 0, bottom: 6, height: 12 },
        { ...slider, yAxisIndex: 0, right: 6, width: 12 },
        { ...inside, xAxisIndex: 0 },
        { ...inside, yAxisIndex: 0 },
      ],
      series: [{
        type: "custom", coordinateSystem: "cartesian2d", silent: true, clip: true, data: [[0, 0]],
        renderItem: (params, api) => this._paint(params.coordSys, api),
      }],
    };
  }

  /* Draws the visible cells as one image, which keeps zooming and selecting steps fast. */
  _paint(area, api) {
    const { values, columns, rows, group, labels, frame } = this.data;
    const [width, height] = api.size([1, 1]).map(Math.abs);
    const [centerX, centerY] = api.coord([0, 0]);
    const [left, top] = [centerX - width / 2 - area.x, centerY - height / 2 - area.y];
    const scale = window.devicePixelRatio || 1;
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(area.width * scale));
    canvas.height = Math.max(1, Math.round(area.height * scale));
    const context = canvas.getContext("2d");
    this._fill(context, left * scale, top * scale, width * scale, height * scale);
    context.scale(scale, scale);
    context.fillStyle = color("--card");
    if (width >= 6 && height >= 6) {
      for (let c = 0; c <= columns.length; c++) context.fillRect(left + c * width - 0.5, 0, 1, area.height);
      for (let r = 0; r <= rows.length; r++) context.fillRect(0, top + r * height - 0.5, area.width, 1);
    }
    if (group > 1 && width * group >= 8)
      for (let c = group; c < columns.length; c += group) {
        const gap = Math.min(3, Math.max(1, width / 3));
        context.fillRect(left + c * width - gap / 2, 0, gap, area.height);
      }
    if (labels && width >= 30 && height >= 12) {
      context.font = `${Math.min(12, Math.floor(height) - 2)}px system-ui, sans-serif`;
      context.textAlign = "center";
      context.textBaseline = "middle";
      const paint = heatColors();
      for (let r = 0; r < rows.length; r++)
        for (let c = 0; c < columns.length; c++) {
          const value = values[r * columns.length + c];
          const [x, y] = [left + (c + 0.5) * width, top + (r + 0.5) * height];
          if (Number.isNaN(value) || x < 0 || x > area.width || y < 0 || y > area.height) continue;
          const [red, green, blue] = paint(value);
          context.fillStyle = 0.3 * red + 0.59 * green + 0.11 * blue > 135 ? "#111" : "#fff";
          context.fillText(value.toFixed(2), x, y);
        }
    }
    if (frame) {
      context.strokeStyle = color("--ink");
      context.lineWidth = 1.5;
      context.strokeRect(left + frame[0] * width, 1, (frame[1] - frame[0] + 1) * width, area.height - 2);
    }
    return { type: "image", style: { image: canvas, x: area.x, y: area.y, width: area.width, height: area.height } };
  }

  /* If several columns or rows share a pixel, it shows the one furthest from the mean. */
  _fill(context, left, top, width, height) {
    const { values, columns, rows } = this.data;
    const { width: across, height: down } = context.canvas;
    const picture = context.createImageData(across, down);
    const pixels = new Uint32Array(picture.data.buffer);
    const paint = heatColors();
    const cells = (start, size, count, pixel) => {
      const low = Math.max(0, Math.floor((pixel - start) / size));
      return [low, Math.min(count, Math.max(low + 1, Math.floor((pixel + 1 - start) / size)))];
    };
    const of = Array.from({ length: across }, (_, x) => cells(left, width, columns.length, x));
    const line = new Uint32Array(across);
    let painted = "";
    for (let y = 0; y < down; y++) {
      const [r0, r1] = cells(top, height, rows.length, y);
      if (painted !== `${r0} ${r1}`) {
        painted = `${r0} ${r1}`;
        let last = [-1, -1], packed = 0;
        for (let x = 0; x < across; x++) {
          const [c0, c1] = of[x];
          if (c0 !== last[0] || c1 !== last[1]) {
            last = of[x];
            const [red, green, blue] = paint(this._extreme(r0, r1, c0, c1));
            packed = c0 < c1 && r0 < r1 ? ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0 : 0;
          }
          line[x] = packed;
        }
      }
      pixels.set(line, y * across);
    }
    context.putImageData(picture, 0, 0);
  }

  _extreme(r0, r1, c0, c1) {
    const { values, columns } = this.data;
    let found = NaN;
    for (let r = r0; r < r1; r++)
      for (let c = c0; c < c1; c++) {
        const value = values[r * columns.length + c];
        if (Number.isNaN(found) || Math.abs(value - 1) > Math.abs(found - 1)) found = value;
      }
    return found;
  }

  /* [row, column] under the pointer, or null. */
  _cell(event) {
    const at = [event.offsetX, event.offsetY];
    if (!this.data || !this.chart.containPixel({ gridIndex: 0 }, at)) return null;
    const [column, row] = this.chart.convertFromPixel({ gridIndex: 0 }, at);
    const inside = row >= 0 && row < this.data.rows.length && column >= 0 && column < this.data.columns.length;
    return inside ? [row, column] : null;
  }

  _point(event) {
    const cell = this._cell(event);
    if (cell) tip.show(this.data.tip(...cell), event.event);
    else tip.hide();
  }
}

/* ---- balancedness over time

   line.show({bins, marks, changes, click}): bins as of the timeline command; marks are rearrangements
   {step, verdict}, changes are {step, text}. onChoose gets the steps [from, to) of a drag, null for all, and
   whether the drag has ended. */

class Timeline {
  constructor(box, onChoose) {
    this.chart = echarts.init(box, null, { renderer: "canvas" });
    this.onChoose = onChoose;
    const zr = this.chart.getZr();
    zr.on("mousemove", (e) => this._point(e));
    zr.on("globalout", () => tip.hide());
    zr.on("click", (e) => {
      const mark = this._mark(e);
      if (mark !== null) this.data.click(mark);
    });
    zr.on("dblclick", () => onChoose(null, true));
    const chosen = (done) => ({ areas }) => {
      const range = areas.length ? areas[0].coordRange : null;
      if (range && range[0] < range[1]) onChoose(range, done);
    };
    this.chart.on("brush", chosen(false));
    this.chart.on("brushEnd", chosen(true));
  }

  show(data) {
    this.data = data;
    this.chart.setOption(this._option(), true);
    this.chart.dispatchAction({
      type: "takeGlobalCursor", key: "brush", brushOption: { brushType: "lineX", brushMode: "single" },
    });
  }

  /* Draw a frame around the selected steps; null: no selection. */
  choose(range) {
    const areas = range ? [{ brushType: "lineX", xAxisIndex: 0, coordRange: range }] : [];
    this.chart.dispatchAction({ type: "brush", areas }, { silent: true });
  }

  _option() {
    const { bins, marks, changes } = this.data;
    const [ink, line, accent] = [color("--muted"), color("--line"), color("--accent")];
    const known = bins.filter((bin) => bin.mean !== null);
    const low = Math.min(...known.map((bin) => bin.min)), high = Math.max(...known.map((bin) => bin.max));
    // Leave room for the triangles below, and put round numbers on the axis.
    const pad = Math.max(0.004, (high - low) * 0.15), unit = roundUnit((high - low + 2 * pad) / 4);
    const floor = Math.max(0, Math.floor((low - pad) / unit) * unit);
    const ceiling = Math.min(1, Math.ceil((high + pad / 4) / unit) * unit);
    // Two points per bin, because a mean is flat within its bin.
    const points = (value) => bins.flatMap((bin) =>
      [bin.first_step, bin.last_step + 1].map((step) => [step, bin.mean === null ? null : value(bin)]));
    const axis = {
      axisLine: { lineStyle: { color: line } },
      axisLabel: { color: ink, fontSize: 11, hideOverlap: true },
      splitLine: { lineStyle: { color: line, opacity: 0.6 } },
    };
    const plain = { type: "line", showSymbol: false, silent: true, lineStyle: { opacity: 0 }, stack: "spread" };
    const rule = { silent: true, symbol: "none", animation: false };
    return {
      animation: false,
      grid: { left: 48, right: 18, top: 14, bottom: 40 },
      toolbox: { left: -200 },
      brush: {
        xAxisIndex: 0, toolbox: [], removeOnClick: false, throttleType: "fixRate", throttleDelay: 30,
        brushStyle: { color: color("--filler"), borderColor: accent, borderWidth: 1 },
        outOfBrush: { colorAlpha: 1, opacity: 1 }, inBrush: { colorAlpha: 1, opacity: 1 },
      },
      tooltip: {
        trigger: "axis", showContent: false, axisPointer: { type: "line", lineStyle: { color: ink } },
      },
      xAxis: {
        ...axis, type: "value", minInterval: 1, min: bins[0].first_step, max: bins[bins.length - 1].last_step + 1,
        name: "step", nameLocation: "middle", nameGap: 24, nameTextStyle: { color: ink, fontSize: 11 },
        splitLine: { show: false },
      },
      yAxis: {
        ...axis, type: "value", min: floor, max: ceiling, interval: unit,
        axisLabel: { ...axis.axisLabel, formatter: (value) => figure(value, unit < 0.01 ? 3 : 2) },
      },
      series: [
        { ...plain, data: points((bin) => bin.min) },
        { ...plain, data: points((bin) => bin.max - bin.min), areaStyle: { color: accent, opacity: 0.18 } },
        {
          type: "line", name: "balancedness", showSymbol: false, silent: true, data: points((bin) => bin.mean),
          lineStyle: { color: accent, width: 2 }, itemStyle: { color: accent },
          markLine: {
            ...rule,
            data: [
              ...marks.map((mark) => ({
                xAxis: mark.step, label: { show: false },
                lineStyle: { color: ink, type: "dashed", width: 1, opacity: marks.length > 40 ? 0.25 : 0.6 },
              })),
              ...changes.map((change) => ({
                xAxis: change.step, lineStyle: { color: color("--warn"), type: "solid", width: 1.5 },
                label: { show: true, formatter: change.text, color: color("--warn"), position: "insideEndTop" },
              })),
            ],
          },
        },
        {
          type: "scatter", name: "rearrangements", symbol: "triangle", symbolSize: [12, 11], silent: true, z: 20,
          data: marks.map((mark) => ({
            value: [mark.step, floor], symbolOffset: [0, -5], itemStyle: { color: color(verdictColor(mark.verdict)) },
          })),
        },
      ],
    };
  }

  _bin(event) {
    const at = [event.offsetX, event.offsetY];
    if (!this.data || !this.chart.containPixel({ gridIndex: 0 }, at)) return null;
    const [step] = this.chart.convertFromPixel({ gridIndex: 0 }, at);
    return this.data.bins.findIndex((bin) => step < bin.last_step + 1);
  }

  /* The rearrangement whose triangle is under the pointer, or null. */
  _mark(event) {
    if (!this.data) return null;
    let found = null, nearest = 9;
    this.data.marks.forEach((mark, i) => {
      const [x, y] = this.chart.convertToPixel({ gridIndex: 0 }, [mark.step, this.chart.getOption().yAxis[0].min]);
      const away = Math.abs(event.offsetX - x);
      if (away < nearest && Math.abs(event.offsetY - (y - 5)) < 12) [found, nearest] = [i, away];
    });
    return found;
  }

  _point(event) {
    const mark = this._mark(event), bin = this._bin(event);
    if (mark !== null) tip.show(this.data.markTip(mark), event.event);
    else if (bin !== null && bin >= 0) tip.show(this.data.tip(bin), event.event);
    else tip.hide();
    this.chart.getZr().setCursorStyle(mark !== null ? "pointer" : bin === null ? "default" : "crosshair");
  }
}

/* A round number of about this size: 1, 2 or 5 times a power of ten. */
function roundUnit(size) {
  const power = 10 ** Math.floor(Math.log10(size));
  return power * [1, 2, 5, 10].find((n) => n * power >= size * 0.75);
}

function verdictColor(verdict) {
  return { helped: "--good", hurt: "--bad", elastic: "--warn" }[verdict] || "--muted";
}
