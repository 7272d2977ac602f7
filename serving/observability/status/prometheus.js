// Prometheus's text format, and what is computed from it. This module knows no page.
//
// A sample is {series, name, labels, value}: `series` is name and labels as they were written,
// which a server does alike every time; `labels` is a Map. What was added to a counter meanwhile
// has the same shape.

const NAME = /[a-zA-Z_:][a-zA-Z0-9_:]*/y;
const LABEL = /\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(,|(?=\}))/sy;
const OPENED = /\s*\{\s*/y;
const CLOSED = /\s*\}/y;
const VALUE = /\s*(\S+)(?:[ \t]+-?\d+)?\s*$/y;
const DECIMAL = /^[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?$/i;
const ESCAPED = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };

/**
 * Read what an endpoint tells.
 * @param {string} text In Prometheus's text format.
 * @returns {{samples: Array, families: Set<string>}} Samples in order, and the names that a type is
 *   told of, whether there are samples of them yet or not.
 * @throws {Error} A line is none of a sample; the message says which.
 */
export function parse(text) {
  const samples = [];
  const families = new Set();
  text.split("\n").forEach((line, index) => {
    if (/^\s*(?:#|$)/.test(line)) {
      const type = /^\s*#\s*TYPE\s+(\S+)/.exec(line);
      if (type) families.add(type[1]);
      return;
    }
    const sample = readSample(line);
    if (!sample) throw new Error(`line ${index + 1} of the metrics is no sample`);
    samples.push(sample);
  });
  return { samples, families };
}

function readSample(line) {
  let at = 0;
  const take = (pattern) => {
    pattern.lastIndex = at;
    const found = pattern.exec(line);
    if (found) at = pattern.lastIndex;
    return found;
  };
  const name = take(NAME);
  if (!name) return null;
  const labels = new Map();
  if (take(OPENED)) {
    for (let label; (label = take(LABEL));) labels.set(label[1], unescaped(label[2]));
    if (!take(CLOSED)) return null;
  }
  const series = line.slice(0, at);
  const found = take(VALUE);
  const value = found && readNumber(found[1]);
  return value === null ? null : { series, name: name[0], labels, value };
}

function unescaped(text) {
  return text.replace(/\\[\\"n]/g, (escaped) => ESCAPED[escaped]);
}

function readNumber(text) {
  if (DECIMAL.test(text)) return Number(text);
  if (/^\+?inf(?:inity)?$/i.test(text)) return Infinity;
  if (/^-inf(?:inity)?$/i.test(text)) return -Infinity;
  return /^[+-]?nan$/i.test(text) ? NaN : null;
}

/** Add samples of a name up, by a label; all labels but that one go, `worker` among them. */
export function sumBy(samples, name, label) {
  const sums = new Map();
  for (const sample of samples) {
    if (sample.name !== name) continue;
    const key = sample.labels.get(label) ?? "";
    sums.set(key, (sums.get(key) ?? 0) + sample.value);
  }
  return sums;
}

/** Add all samples of a name up. */
export function sum(samples, name) {
  return samples.reduce((total, one) => (one.name === name ? total + one.value : total), 0);
}

/**
 * Estimate a quantile from a histogram's buckets, as Prometheus's histogram_quantile does: ranks
 * lie evenly between the bounds of a bucket, the lowest starts at 0, and what lies above the last
 * bound is told as that bound.
 * @param {number} q From 0 to 1.
 * @param {Map<string, number>} buckets How many are at most `le`, by `le`.
 * @returns {number} NaN if nothing was counted, or the bucket +Inf is missing.
 */
export function quantile(q, buckets) {
  const sorted = [...buckets]
    .map(([le, count]) => ({ le: readNumber(le) ?? NaN, count }))
    .sort((one, other) => one.le - other.le);
  if (sorted.length < 2 || sorted.at(-1).le !== Infinity) return NaN;
  for (let i = 1; i < sorted.length; i++) {
    // Workers are scraped one after the other, so sums may be a little out of order.
    sorted[i].count = Math.max(sorted[i].count, sorted[i - 1].count);
  }
  const total = sorted.at(-1).count;
  if (!(total > 0)) return NaN;
  const rank = q * total;
  const found = sorted.findIndex((bucket) => bucket.count >= rank);
  if (found === sorted.length - 1) return sorted.at(-2).le;
  const { le: end, count } = sorted[found];
  if (found === 0 && end <= 0) return end;
  const { le: start, count: before } = found ? sorted[found - 1] : { le: 0, count: 0 };
  return start + ((end - start) * (rank - before)) / (count - before);
}
