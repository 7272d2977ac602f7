// What the page remembers: what was added to counters from one scrape to the next, and the points
// of its charts. This module knows no page, and time is an argument, in seconds.
//
// A point is {time, codes, rows, outside, refusals, median, slowest, queue, failed}, or
// {time, missed} where there was no answer. Null is not known yet; undefined is what the server
// does not measure.

import { quantile, sum, sumBy } from "/prometheus.js";

export const KEPT_S = 300;

const INFERENCE = new Set(["ModelInfer", "ModelStreamInfer"]);
const BUCKETS = "kanserve_request_seconds_bucket";
const COUNTED = new Set([
  "kanserve_calls_total",
  "kanserve_rows_total",
  "kanserve_out_of_grid_rows_total",
  "kanserve_refusals_total",
  BUCKETS,
]);

/** The last minutes. */
export class History {
  /** @param {number} windowS Rates and quantiles are those of so many seconds. */
  constructor(windowS) {
    this.windowS = windowS;
    this.points = [];
    this.steps = []; // of the window: {time, seconds, added}, samples of what came in a time
    this.seen = new Map(); // series -> its last value
    this.workers = new Set();
    this.last = null; // when there was an answer
  }

  /** Take in what `parse` gave of a scrape. */
  add(time, { samples, families }) {
    const added = this.#added(samples);
    const step = { time, seconds: this.last === null ? 0 : time - this.last, added };
    // By their middles: where a step ends is a hair before or after the window as clocks have it.
    const isRecent = (one) => one.time - one.seconds / 2 > time - this.windowS;
    this.steps = [...this.steps.filter(isRecent), step];
    this.last = time;
    const failed = sumBy(added, "kanserve_calls_total", "code").get("INTERNAL") ?? 0;
    this.#keep({ ...this.#point(samples, families), time, failed });
  }

  /** Remember that there was no answer. */
  miss(time) {
    this.#keep({ time, missed: true });
  }

  /** What was added in the window, and in how many seconds that was. */
  recent() {
    return {
      added: this.steps.flatMap((step) => step.added),
      seconds: this.steps.reduce((total, step) => total + step.seconds, 0),
    };
  }

  #keep(point) {
    this.points.push(point);
    this.points = this.points.filter(({ time }) => time > point.time - KEPT_S);
  }

  #added(samples) {
    const added = [];
    const workers = new Set();
    for (const sample of samples) {
      const worker = sample.labels.get("worker") ?? "";
      workers.add(worker);
      if (!COUNTED.has(sample.name)) continue;
      const before = this.seen.get(sample.series);
      this.seen.set(sample.series, sample.value);
      let value = 0;
      if (before === undefined) {
        // Counters appear with the first thing they count, but a worker brings all of its own.
        if (this.workers.has(worker)) value = sample.value;
      } else {
        value = sample.value < before ? sample.value : sample.value - before; // started anew
      }
      added.push({ ...sample, value });
    }
    workers.forEach((worker) => this.workers.add(worker));
    return added;
  }

  #point(samples, families) {
    const { added, seconds } = this.recent();
    const rates = (sums) =>
      seconds > 0 ? new Map([...sums].map(([key, value]) => [key, value / seconds])) : null;
    const rows = sum(added, "kanserve_rows_total");
    const outside = sum(added, "kanserve_out_of_grid_rows_total");
    const measured = sum(added.filter(isMeasured(samples)), "kanserve_rows_total");
    const point = {
      codes: rates(sumBy(added.filter(isInference), "kanserve_calls_total", "code")),
      rows: seconds > 0 ? rows / seconds : null,
      outside: measured > 0 ? outside / measured : NaN,
    };
    if (families.has("kanserve_refusals_total")) {
      point.refusals = rates(sumBy(added, "kanserve_refusals_total", "reason"));
    }
    if (families.has("kanserve_request_seconds")) {
      const buckets = sumBy(added, BUCKETS, "le");
      point.median = quantile(0.5, buckets);
      point.slowest = quantile(0.99, buckets);
    }
    if (families.has("kanserve_queue_rows")) point.queue = sum(samples, "kanserve_queue_rows");
    return point;
  }
}

/** Whether a sample is of a model that tells which of its rows lie outside of its grid. */
function isMeasured(samples) {
  const models = sumBy(samples, "kanserve_out_of_grid_rows_total", "model");
  return (sample) => models.has(sample.labels.get("model"));
}

/** Whether a sample is of requests for answers, not of probes and questions about models. */
function isInference(sample) {
  return INFERENCE.has(sample.labels.get("method"));
}

/**
 * Tell what each model does now.
 * @returns {function(string)} Gives {rows, median, slowest, queue, outside} of a model, in rows a
 *   second, seconds, rows, and as a share of all rows since the server's start; NaN is not known,
 *   as `outside` is of a model that has no grid at its inputs.
 */
export function perModel(history, { samples }) {
  const { added, seconds } = history.recent();
  const rows = sumBy(added, "kanserve_rows_total", "model");
  const queues = sumBy(samples, "kanserve_queue_rows", "model");
  const allRows = sumBy(samples, "kanserve_rows_total", "model");
  const outside = sumBy(samples, "kanserve_out_of_grid_rows_total", "model");
  return (model) => {
    const buckets = sumBy(
      added.filter((sample) => sample.labels.get("model") === model),
      BUCKETS,
      "le",
    );
    return {
      rows: seconds > 0 ? (rows.get(model) ?? 0) / seconds : NaN,
      median: quantile(0.5, buckets),
      slowest: quantile(0.99, buckets),
      queue: queues.get(model) ?? NaN,
      outside: allRows.get(model) ? (outside.get(model) ?? NaN) / allRows.get(model) : NaN,
    };
  };
}
