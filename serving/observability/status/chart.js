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
   *   note: what the large text is of, if that is not all of it.
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
    const title = element("h3", "", spec.title);
    if (spec.note) title.append(" ", element("span", "note", spec.note));
    caption.append(title, this.headline);
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
    // What has been nothing all the time is no line: it would only hide the others.
    const found = all.flatMap(({ lines }) => [...(lines ?? [])]).filter(([, value]) => value !== 0);
    const names = [...new Set(found.map(([name]) => name))].sort(this.#inOrder);
    const last = points.findLast(({ missed }) => !missed);
    const known = read(last) !== undefined;
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
      const style = spec.style(name);
      const places = values.map((value, i) => [x(all[i].time), y(value)]);
      const parts = split(places, ([, height]) => Number.isFinite(height)).map(path);
      if (style === "good") {
        const areas = parts.map(({ d, from, to }) => `${d}L${to} ${HEIGHT}L${from} ${HEIGHT}Z`);
        drawn.push(svg("path", { class: "area", d: areas.join("") }));
      }
      drawn.push(svg("path", { class: `line ${style}`, d: parts.map(({ d }) => d).join("") }));
    }
    if (at)
      drawn.push(svg("line", { class: "at", x1: x(at.time), x2: x(at.time), y1: 0, y2: HEIGHT }));
    this.svg.replaceChildren(...drawn);
    say(this.top, known ? spec.format(top) : "");

    const values = read(at ?? last);
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

/** The end of an axis: a short number. */
function roundUp(highest) {
  if (!(highest > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(highest));
  const steps = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8];
  return (steps.find((step) => step * power >= highest) ?? 10) * power;
}

/** Part a list where something does not hold, which is left out. */
function split(list, holds) {
  const parts = [[]];
  for (const one of list) {
    if (holds(one)) parts.at(-1).push(one);
    else parts.push([]);
  }
  return parts.filter((part) => part.length);
}

/** A line through points, as SVG writes it, and where on the axis it starts and ends. */
function path(points) {
  const places = points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`);
  const [from, to] = [points[0], points.at(-1)].map(([x]) => x.toFixed(1));
  return {
    d: `M${places[0]}h0${places
      .slice(1)
      .map((place) => `L${place}`)
      .join("")}`,
    from,
    to,
  };
}
