// Numbers as a person reads them. NaN, null and undefined are a dash.

const DASH = "–";
const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

/** A count, or so many a second. */
export function count(value) {
  if (!known(value)) return DASH;
  if (value >= 100_000) return compact.format(value);
  return (value >= 1000 ? whole : precise).format(value);
}

/** A time in seconds. */
export function duration(value) {
  if (!known(value)) return DASH;
  if (value >= 1) return `${precise.format(value)} s`;
  if (value >= 1e-3) return `${precise.format(value * 1e3)} ms`;
  return value === 0 ? "0 ms" : `${precise.format(value * 1e6)} µs`;
}

/** A share of 1; what is more than nothing never reads as nothing. */
export function percent(value) {
  if (!known(value)) return DASH;
  return value > 0 && value < 1e-5 ? "<0.001 %" : `${precise.format(value * 100)} %`;
}

/** `1 model`, `2 models`. */
export function several(number, what, plural = `${what}s`) {
  return `${whole.format(number)} ${number === 1 ? what : plural}`;
}

/** A time of day. */
export function clock(date) {
  return date.toLocaleTimeString("en-GB");
}
