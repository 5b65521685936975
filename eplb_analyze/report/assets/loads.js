"use strict";
/* Loads: unpacks the arrays of eplb_analyze/report/loads.py and sums them over bins of steps. */

async function inflate(packed) {
  const [rows, width] = packed.shape;
  const out = new Uint16Array(rows * width);
  if (!out.length) return out;
  const text = atob(packed.data);
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const octets = new Uint8Array(await new Response(stream).arrayBuffer());
  const high = out.length; // the low bytes of all numbers, then the high bytes
  const step = packed.stride * width;
  for (let i = 0; i < out.length; i++) {
    const value = octets[i] | (octets[high + i] << 8);
    out[i] = step && i >= step ? value + out[i - step] : value;
  }
  return out;
}

class Loads {
  static NOBODY = 65535;

  static async of(packed) {
    const self = new Loads();
    self.edges = packed.edges; // the first step of each bin, then the step after the last bin
    self.steps = packed.steps; // complete steps in each bin
    self.times = packed.times; // time of its first step, ms since 1970
    self.bins = packed.steps.length;
    self.layers = packed.layers; // the model's layer numbers
    self.rows = packed.layers.length;
    self.ranks = packed.ep_size;
    self.perRank = packed.slots_per_rank;
    self.lost = new Set(packed.lost_ranks); // the engine went on without these; no mean has them
    self.slots = packed.slots.shape[1];
    self.experts = packed.experts;
    self.perToken = packed.per_token; // token replication
    self._slots = await inflate(packed.slots);
    self._units = packed.slots.units; // tokens per count, by row; null: 1
    self._placed = await inflate(packed.placements.slots);
    self._apart = await inflate(packed.apart.experts);
    self._apartUnits = packed.apart.experts.units;
    // The row of _placed in force at the end of each bin; -1: not known.
    self._row = new Int32Array(self.bins * self.rows).fill(-1);
    packed.placements.bin.forEach((bin, row) => {
      const layer = packed.placements.layer[row];
      for (let b = bin; b < self.bins; b++) self._row[b * self.rows + layer] = row;
    });
    self._apartRow = new Map();
    packed.apart.bin.forEach((bin, row) =>
      self._apartRow.set(bin * self.rows + packed.apart.layer[row], row));
    return self;
  }

  /* Tokens by layer and slot over bins first to last: Float64Array [layers × slots]. */
  bySlot(first, last) {
    const size = this.rows * this.slots;
    const out = new Float64Array(size);
    for (let b = first; b <= last; b++) {
      for (let layer = 0; layer < this.rows; layer++) {
        const unit = this._unit(b, layer), from = (b * this.rows + layer) * this.slots;
        for (let s = 0, o = layer * this.slots; s < this.slots; s++, o++) out[o] += unit * this._slots[from + s];
      }
    }
    return out;
  }

  /* Tokens by layer and EP rank, from the result of bySlot: Float64Array [layers × ranks]. */
  byRank(bySlot) {
    const out = new Float64Array(this.rows * this.ranks);
    bySlot.forEach((load, i) => {
      const layer = Math.floor(i / this.slots), slot = i % this.slots;
      out[layer * this.ranks + Math.floor(slot / this.perRank)] += load;
    });
    return out;
  }

  /* Tokens by layer and logical expert over bins first to last: Float64Array [layers × experts]. */
  byExpert(first, last) {
    const out = new Float64Array(this.rows * this.experts);
    for (let b = first; b <= last; b++) {
      for (let layer = 0; layer < this.rows; layer++) this._addExperts(b, layer, out, layer * this.experts);
    }
    return out;
  }

  /* Tokens of one layer's ranks in each bin: Float64Array [ranks × bins]. */
  rankOverTime(layer) {
    const out = new Float64Array(this.ranks * this.bins);
    for (let b = 0; b < this.bins; b++) {
      const unit = this._unit(b, layer), from = (b * this.rows + layer) * this.slots;
      for (let s = 0; s < this.slots; s++)
        out[Math.floor(s / this.perRank) * this.bins + b] += unit * this._slots[from + s];
    }
    return out;
  }

  /* Tokens of one layer's experts in each bin: Float64Array [bins × experts]. */
  expertsOverTime(layer) {
    const out = new Float64Array(this.bins * this.experts);
    for (let b = 0; b < this.bins; b++) this._addExperts(b, layer, out, b * this.experts);
    return out;
  }

  /* The experts in the slots at the end of a bin: Uint16Array [slots], NOBODY if empty; null: not known. */
  placement(bin, layer) {
    const row = this._row[bin * this.rows + layer];
    return row < 0 ? null : this._placed.subarray(row * this.slots, (row + 1) * this.slots);
  }

  /* Whether a layer's placement changed between the ends of two bins, or within the first. */
  changed(first, last, layer) {
    if (this._apartRow.has(first * this.rows + layer)) return true;
    return this._row[first * this.rows + layer] !== this._row[last * this.rows + layer];
  }

  rankOf(slot) {
    return Math.floor(slot / this.perRank);
  }

  /* How many slots of a placement hold an expert: what its tokens can be spread over. */
  filled(placed) {
    return placed.reduce((sum, expert) => sum + (expert !== Loads.NOBODY), 0);
  }

  _unit(bin, layer) {
    return (this._units ? this._units[bin * this.rows + layer] : 1) / this.perToken;
  }

  _addExperts(bin, layer, out, at) {
    const apart = this._apartRow.get(bin * this.rows + layer);
    if (apart !== undefined) {
      const unit = (this._apartUnits ? this._apartUnits[apart] : 1) / this.perToken;
      for (let e = 0; e < this.experts; e++) out[at + e] += unit * this._apart[apart * this.experts + e];
      return;
    }
    const placed = this.placement(bin, layer);
    if (!placed) return;
    const unit = this._unit(bin, layer), from = (bin * this.rows + layer) * this.slots;
    for (let s = 0; s < this.slots; s++)
      if (placed[s] !== Loads.NOBODY) out[at + placed[s]] += unit * this._slots[from + s];
  }
}

/* Each value divided by the mean of its row over the columns that serve; NaN in others and without tokens. */
function timesMean(values, rows, serves = () => true) {
  const width = values.length / rows, out = new Float64Array(values.length).fill(NaN);
  const columns = [...Array(width).keys()].filter(serves);
  for (let row = 0; row < rows; row++) {
    const total = columns.reduce((sum, c) => sum + values[row * width + c], 0);
    if (total > 0) for (const c of columns) out[row * width + c] = (values[row * width + c] * columns.length) / total;
  }
  return out;
}
