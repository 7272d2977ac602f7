// The edges of a layer as small multiples: base, spline and their sum over the knots.

const PLANE = { width: 228, height: 132 };
const AREA = { left: 48, right: 222, top: 8, bottom: 106 };
const EDGES_A_PAGE = window.matchMedia("(max-width: 46rem)").matches ? 8 : 25; // rows of five

/** Which row of a layer's knots an input has. */
function rowOf(layer, input) {
  if (layer.knots.length === layer.knotCount) return 0;
  let [low, high] = [0, layer.inputs.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (layer.inputs[middle] < input) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** A row of a layer's knots. */
function knotsOf(layer, row) {
  return layer.knots.subarray(row * layer.knotCount, (row + 1) * layer.knotCount);
}

/**
 * Every B-spline basis function at a point of the interval between two neighbouring knots, both ends
 * included, by the Cox-de Boor recursion.
 * @param {Float32Array} knots Rising.
 * @param {number} order The degree.
 * @param {number} interval Number of the knot at its left.
 * @param {number} x The point.
 */
function basis(knots, order, interval, x) {
  let values = new Float64Array(knots.length - 1);
  values[interval] = 1;
  for (let p = 1; p <= order; p++) {
    const above = new Float64Array(values.length - 1);
    for (let i = 0; i < above.length; i++) {
      const rising = knots[i + p] - knots[i];
      const falling = knots[i + p + 1] - knots[i + 1];
      above[i] =
        (rising > 0 ? ((x - knots[i]) / rising) * values[i] : 0) +
        (falling > 0 ? ((knots[i + p + 1] - x) / falling) * values[i + 1] : 0);
    }
    values = above;
  }
  return values;
}

/** The points of an input's curves, with the basis and the base activation there. */
function pointsOf(layer, row) {
  layer.points ??= new Map();
  if (!layer.points.has(row)) {
    const knots = knotsOf(layer, row);
    const x = [];
    const functions = [];
    for (let i = 0; i + 1 < knots.length; i++) {
      for (let part = 0; part <= layer.steps; part++) {
        const at = knots[i] + (knots[i + 1] - knots[i]) * (part / layer.steps);
        x.push(at);
        functions.push(basis(knots, layer.order, i, at));
      }
    }
    const activation = layer.activation.subarray(row * x.length, (row + 1) * x.length);
    layer.points.set(row, { knots, x, functions, activation });
  }
  return layer.points.get(row);
}

/** An edge's curves. */
function curvesOf(layer, place) {
  const output = Math.floor(layer.edges[place] / layer.in);
  const input = layer.edges[place] % layer.in;
  const points = pointsOf(layer, rowOf(layer, input));
  const weights = layer.spline.subarray(place * layer.functions, (place + 1) * layer.functions);
  const base = Array.from(points.activation, (value) => layer.base[place] * value);
  const spline = points.functions.map((values) =>
    values.reduce((sum, value, i) => (value ? sum + value * weights[i] : sum), 0),
  );
  const total = spline.map((value, i) => value + base[i]);
  return { input, output, importance: layer.importance[place], points, base, spline, total };
}

/** The lowest and the highest of what edges give, zero included. */
function heights(edges) {
  let [low, high] = [0, 0];
  for (const { base, spline, total } of edges) {
    for (const values of [base, spline, total]) {
      for (const value of values) {
        if (!Number.isFinite(value)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
  }
  return high > low ? [low, high] : [-1, 1];
}

/** A line through points as SVG writes it, parted where a value is no number. */
function line(xs, ys, x, y) {
  let pen = "M";
  let path = "";
  ys.forEach((value, i) => {
    if (!Number.isFinite(value)) {
      pen = "M";
      return;
    }
    path += `${pen}${x(xs[i]).toFixed(2)} ${y(value).toFixed(2)}`;
    pen = "L";
  });
  return path;
}

/** Draw an edge. */
function drawEdge(layer, edge, [low, high]) {
  const { points, input, output } = edge;
  const { knots } = points;
  const [start, end] = [knots[0], knots.at(-1)];
  const x = (value) => AREA.left + ((value - start) / (end - start)) * (AREA.right - AREA.left);
  const y = (value) => AREA.bottom - ((value - low) / (high - low)) * (AREA.bottom - AREA.top);
  const grid = [knots[layer.order], knots[knots.length - 1 - layer.order]];
  const lowest = Math.min(...edge.total.filter(Number.isFinite));
  const highest = Math.max(...edge.total.filter(Number.isFinite));
  const picture = svg("svg", {
    viewBox: `0 0 ${PLANE.width} ${PLANE.height}`,
    role: "img",
    "aria-label":
      `Edge from input ${input} to output ${output}: importance ${three(edge.importance)}, ` +
      `between ${three(lowest)} and ${three(highest)} ` +
      `from ${three(start)} to ${three(end)}`,
    // Where the drawn numbers lie, for whoever wants to read them back.
    "data-x": `${start} ${end} ${AREA.left} ${AREA.right}`,
    "data-y": `${low} ${high} ${AREA.bottom} ${AREA.top}`,
  });
  const [from, to] = grid.map(x);
  for (const [left, right] of [[AREA.left, from], [to, AREA.right]]) {
    const width = Math.max(0, right - left);
    const height = AREA.bottom - AREA.top;
    picture.append(svg("rect", { class: "margin", x: left, y: AREA.top, width, height }));
  }
  const ticks = Array.from(knots, (knot) => `M${x(knot).toFixed(1)} ${AREA.bottom}v-5`).join("");
  picture.append(
    svg("path", { class: "rule", d: `M${AREA.left} ${y(0).toFixed(1)}H${AREA.right}` }),
    svg("path", { class: "axis", d: `M${AREA.left} ${AREA.bottom}H${AREA.right}` }),
    svg("path", { class: "knot", d: ticks }),
    svg("path", { class: "curve base", d: line(points.x, edge.base, x, y) }),
    svg("path", { class: "curve spline", d: line(points.x, edge.spline, x, y) }),
    svg("path", { class: "curve total", d: line(points.x, edge.total, x, y) }),
  );
  const label = (place, text, anchor) =>
    svg("text", { class: "tick", ...place, "text-anchor": anchor }, text);
  picture.append(
    label({ x: AREA.left - 4, y: AREA.top + 8 }, three(high), "end"),
    label({ x: AREA.left - 4, y: AREA.bottom }, three(low), "end"),
    label({ x: from, y: AREA.bottom + 15 }, three(grid[0]), "middle"),
    label({ x: to, y: AREA.bottom + 15 }, three(grid[1]), "middle"),
  );
  const zero = y(0);
  if (zero - AREA.top > 18 && AREA.bottom - zero > 12)
    picture.append(label({ x: AREA.left - 4, y: zero + 3.5 }, "0", "end"));
  return picture;
}

/** Show the edges of a layer. */
function showEdges(section, layer) {
  const form = section.querySelector("form");
  const { input, output, same } = form.elements;
  const all = Array.from(layer.edges.keys());
  const place = section.querySelector(".edges");

  const choose = () => {
    const [from, to] = [wanted(input), wanted(output)];
    if (from === null && to === null) return all;
    return all.filter(
      (i) =>
        (from === null || layer.edges[i] % layer.in === from) &&
        (to === null || Math.floor(layer.edges[i] / layer.in) === to),
    );
  };
  const show = (page) => {
    const edges = page.map((i) => curvesOf(layer, i));
    const common = heights(edges);
    const figures = edges.map((edge) => {
      const figure = element("figure", "card edge");
      const caption = element("figcaption");
      const count = element("span", "note", three(edge.importance));
      count.title = "importance";
      caption.append(element("span", "", `${edge.input} → ${edge.output}`), count);
      figure.append(caption, drawEdge(layer, edge, same.checked ? common : heights([edge])));
      return figure;
    });
    if (!figures.length) {
      const missing = all.length < layer.in * layer.out;
      const text = missing ? "Not among the edges that this page holds." : "There is no such edge.";
      figures.push(element("p", "quiet", text));
    }
    place.replaceChildren(...figures);
  };
  paged(form, EDGES_A_PAGE, choose, show);
}
