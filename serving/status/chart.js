// A small chart of the last minutes: lines in SVG, drawn by hand. This module knows no metrics.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300; // a unit is a second
const HEIGHT = 72;

/** Make an element with classes and text. Text is never taken for HTML. */
export function element(tag, classes = "", text = "") {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text) made.textContent = text;
  return made;
}

/** Set a text where it differs, so that nothing selected or read aloud is disturbed. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** One chart. */
export class Chart {
  /**
   * @param {object} spec
   *   title: what is shown.
   *   read(point): a Map from a line's name to its value; null if that is not known yet, undefined
   *     if it never will be.
   *   headline(lines): the large text, from such a Map.
   *   format(value): a value in words.
   *   style(name): the class of a line, which gives its colour and its dashes.
   *   order: names of lines, the first ones first; others follow.
   *   absent: what to say if it never will be known.
   * @param {function(?number)} onHover Told which time the pointer is at, as a share of the width
   *   from the right; null when it leaves.
   */
  constructor(spec, onHover) {
    this.spec = spec;
    this.node = element("figure", "chart");
    const caption = element("figcaption");
    this.headline = element("p", "headline", "–");
    caption.append(element("h3", "", spec.title), this.headline);
    const plot = element("div", "plot");
    this.svg = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
    });
    this.top = element("span", "top");
    this.top.setAttribute("aria-hidden", "true");
    const ends = element("p", "ends");
    ends.setAttribute("aria-hidden", "true");
    ends.append(element("span", "", "5 min ago"), element("span", "", "now"));
    plot.append(this.svg, this.top);
    this.legend = element("ul", "legend");
    this.node.append(caption, plot, ends, this.legend);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      onHover(Math.min(1, Math.max(0, (box.right - event.clientX) / box.width)));
    });
    plot.addEventListener("pointerleave", () => onHover(null));
  }

  /**
   * Draw.
   * @param {Array} points Ascending by `time`, in seconds.
   * @param {number} now The time at the right end.
   * @param {?object} at The point whose values are told instead of the last one's.
   */
  draw(points, now, at) {
    const { spec } = this;
    const read = (point) => (point && !point.missed ? spec.read(point) : null);
    const all = points.map((point) => ({ time: point.time, lines: read(point) }));
    const names = [...new Set(all.flatMap(({ lines }) => [...(lines?.keys() ?? [])]))].sort(this.#inOrder);
    const known = read(points.findLast(({ missed }) => !missed)) !== undefined;
    const lines = (names.length ? names : [""]).map((name) => ({
      name,
      values: all.map(({ lines }) => (lines ? (lines.get(name) ?? 0) : NaN)),
    }));
    const highest = Math.max(0, ...lines.flatMap(({ values }) => values.filter(Number.isFinite)));
    const top = roundUp(highest);
    const x = (time) => WIDTH - (now - time);
    const y = (value) => HEIGHT - (value / top) * HEIGHT;

    const drawn = [0, 0.5, 1].map((share) =>
      svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: share * HEIGHT, y2: share * HEIGHT }),
    );
    for (const { name, values } of lines) {
      const d = path(values.map((value, i) => [x(all[i].time), y(value)]));
      drawn.push(svg("path", { class: `line ${spec.style(name)}`, d }));
    }
    if (at) drawn.push(svg("line", { class: "at", x1: x(at.time), x2: x(at.time), y1: 0, y2: HEIGHT }));
    this.svg.replaceChildren(...drawn);
    say(this.top, known ? spec.format(top) : "");

    const values = read(at ?? points.at(-1));
    this.node.classList.toggle("absent", !known);
    say(this.headline, values ? spec.headline(values) : known ? "–" : spec.absent);
    this.#tell(names, (name) => (values ? spec.format(values.get(name) ?? 0) : "–"));
    this.svg.setAttribute("aria-label", this.#inWords(lines, known));
  }

  #inOrder = (one, other) => {
    const order = this.spec.order ?? [];
    const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length);
    return place(one) - place(other) || (one < other ? -1 : 1);
  };

  /** Keep the list of lines, and say a value of each. */
  #tell(names, value) {
    while (this.legend.children.length > names.length) this.legend.lastChild.remove();
    names.forEach((name, i) => {
      let item = this.legend.children[i];
      if (!item) {
        item = element("li");
        const swatch = svg("svg", { class: "swatch", viewBox: "0 0 18 4", "aria-hidden": "true" });
        swatch.append(svg("line", { x1: 0, x2: 18, y1: 2, y2: 2 }));
        item.append(swatch, element("span", "name"), element("span", "value"));
        this.legend.append(item);
      }
      item.querySelector("line").setAttribute("class", `line ${this.spec.style(name)}`);
      say(item.querySelector(".name"), name);
      say(item.querySelector(".value"), value(name));
    });
  }

  #inWords(lines, known) {
    if (!known) return `${this.spec.title}: ${this.spec.absent}`;
    const words = lines.map(({ name, values }) => {
      const found = values.filter(Number.isFinite);
      if (!found.length) return `${name} nothing to tell`.trim();
      const last = Number.isFinite(values.at(-1)) ? this.spec.format(values.at(-1)) : "nothing";
      return `${name} now ${last}, highest ${this.spec.format(Math.max(...found))}`.trim();
    });
    return `${this.spec.title} in the last five minutes: ${words.join("; ")}`;
  }
}

function svg(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** The end of an axis: 1, 2 or 5 times a power of ten. */
function roundUp(highest) {
  if (!(highest > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(highest));
  return ([1, 2, 5].find((step) => step * power >= highest) ?? 10) * power;
}

/** Lines through points, with a gap where there is none to draw. */
function path(points) {
  let drawing = false;
  const parts = points.map(([x, y]) => {
    if (!Number.isFinite(y)) {
      drawing = false;
      return "";
    }
    const place = `${x.toFixed(1)} ${y.toFixed(1)}`;
    const part = drawing ? `L${place}` : `M${place}h0`; // h0: one point alone is a dot
    drawing = true;
    return part;
  });
  return parts.join("");
}
