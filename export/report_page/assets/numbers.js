// The numbers of the page, read from its block of data, and how they are written.
"use strict";

const DASH = "–";
const SVG = "http://www.w3.org/2000/svg";
const grouped = new Intl.NumberFormat("en");

/** Read an array: base64 of little-endian numbers. */
function unpack(text, Kind) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
}

/** Read a layer as embedding.py writes it; its arrays are read when it is first shown. */
function openLayer(content) {
  const edges = unpack(content.edges, Uint32Array);
  const spline = unpack(content.spline, Float32Array);
  const functions = edges.length ? spline.length / edges.length : 0;
  const inputs = unpack(content.inputs, Uint32Array);
  const samples = content.samples && {
    counts: unpack(content.samples.counts, Uint16Array),
    low: unpack(content.samples.low, Float32Array),
    high: unpack(content.samples.high, Float32Array),
  };
  return {
    ...content,
    edges,
    spline,
    functions,
    inputs,
    samples,
    knotCount: functions + content.order + 1,
    knots: unpack(content.knots, Float32Array),
    activation: unpack(content.activation, Float32Array),
    importance: unpack(content.importance, Float32Array),
    base: unpack(content.base, Float32Array),
    attribution: unpack(content.attribution, Float32Array),
  };
}

/** Make an element of HTML with classes and text. Text is never taken for HTML. */
function element(tag, classes = "", text = "") {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text) made.textContent = text;
  return made;
}

/** Make an element of SVG. */
function svg(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

/** A number with three digits. */
function three(value) {
  if (!Number.isFinite(value)) return DASH;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(1).replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

/** A share of 1; what is more than nothing never reads as nothing, and less than all not as all. */
function percent(value) {
  if (!Number.isFinite(value)) return DASH;
  if (value > 0 && value < 1e-5) return "<0.001 %";
  const shown = Number((100 * value).toPrecision(3));
  if (value < 1 && shown === 100) return `${(Math.floor(value * 1e4) / 100).toFixed(2)} %`;
  return `${shown} %`;
}

/**
 * A list that is shown a page at a time, with its controls.
 * @param {HTMLFormElement} form Has buttons `back` and `next` and an output.
 * @param {number} size How many fit on a page.
 * @param {function(): Array} choose Gives what is to be shown, all of it.
 * @param {function(Array)} show Shows a page.
 */
function paged(form, size, choose, show) {
  const { back, next } = form.elements;
  const told = form.querySelector("output");
  let chosen = [];
  let first = 0;
  const turn = (to) => {
    first = to;
    const page = chosen.slice(first, first + size);
    show(page);
    const last = first + page.length;
    const all = grouped.format(chosen.length);
    told.textContent = page.length
      ? `${grouped.format(first + 1)} to ${grouped.format(last)} of ${all}`
      : "none";
    back.disabled = first === 0;
    next.disabled = last >= chosen.length;
  };
  const restart = () => {
    chosen = choose();
    turn(0);
  };
  back.addEventListener("click", () => turn(Math.max(0, first - size)));
  next.addEventListener("click", () => turn(first + size));
  form.addEventListener("input", restart);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  restart();
}

/** Read a field for a whole number: null if it is empty. */
function wanted(field) {
  return field.value === "" ? null : Number(field.value);
}
