// The inputs of a layer: their grids, where the samples lie, and what the outputs owe to them.

const INPUTS_A_PAGE = 15;
const BAR = 6;

/** How many of an input's samples lie below, within and above its grid. */
function tally(counts) {
  const all = counts.reduce((sum, count) => sum + count, 0);
  return { below: counts[0] / all, above: counts.at(-1) / all, all };
}

/** Draw how the samples of an input lie on its grid: a bar for each part, and one beyond each end. */
function drawSamples(counts) {
  const { below, above, all } = tally(counts);
  const height = 28;
  const gap = 4;
  const width = counts.length * BAR + 2 * gap;
  const highest = Math.max(...counts, 1);
  const label = all
    ? `${percent(below)} below the grid, ${percent(above)} above it`
    : "no finite values";
  const picture = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: "samples",
    role: "img",
    "aria-label": label,
  });
  const [start, end] = [BAR + gap, width - BAR - gap];
  picture.append(svg("path", { class: "axis", d: `M${start} ${height - 0.5}H${end}` }));
  counts.forEach((count, i) => {
    if (!count) return;
    const outside = i === 0 || i === counts.length - 1;
    const tall = Math.max(1.5, (count / highest) * (height - 2));
    const x = i * BAR + (i > 0 ? gap : 0) + (i === counts.length - 1 ? gap : 0);
    const bar = { x, y: height - tall, width: BAR - 1, height: tall };
    picture.append(svg("rect", { class: outside ? "outside" : "bar", ...bar }));
  });
  return picture;
}

/** Show the inputs of a layer. */
function showInputs(box, layer) {
  const form = box.querySelector("form");
  const table = box.querySelector("table");
  const { input, order } = form.elements;
  const parts = layer.samples && layer.samples.counts.length / layer.inputs.length;
  const counts = (i) => Array.from(layer.samples.counts.subarray(i * parts, (i + 1) * parts));
  const outside = (i) => {
    const { below, above } = tally(counts(i));
    return below + above;
  };
  const all = Array.from(layer.inputs.keys());
  const falling = (value) => {
    const values = all.map((i) => value(i) || 0);
    return all.toSorted((one, other) => values[other] - values[one]);
  };
  const orders = {
    attribution: falling((i) => layer.attribution[i]),
    outside: layer.samples ? falling(outside) : all,
    number: all,
  };
  const choose = () => {
    const number = wanted(input);
    const ordered = orders[order.value];
    return number === null ? ordered : ordered.filter((i) => layer.inputs[i] === number);
  };
  const show = (page) => {
    const rows = page.map((i) => {
      const row = element("tr");
      const knots = knotsOf(layer, layer.knots.length === layer.knotCount ? 0 : i);
      const cell = (content, classes = "num") => {
        const made = element("td", classes);
        made.append(content);
        row.append(made);
      };
      const head = element("th", "num", String(layer.inputs[i]));
      head.scope = "row";
      row.append(head);
      cell(three(knots[layer.order]));
      cell(three(knots[knots.length - 1 - layer.order]));
      if (layer.samples) {
        cell(drawSamples(counts(i)), "");
        cell(three(layer.samples.low[i]));
        cell(three(layer.samples.high[i]));
        cell(percent(outside(i)));
      }
      cell(percent(layer.attribution[i]));
      return row;
    });
    table.tBodies[0].replaceChildren(...rows);
    table.hidden = !rows.length;
  };
  paged(form, INPUTS_A_PAGE, choose, show);
}
