// The status page of a server: reads /metrics again and again, and shows what an engineer on call
// wants to see first. Nothing is kept outside of this page, and no text is taken for HTML.

import { Chart, element, say } from "/chart.js";
import { History, KEPT_S, perModel } from "/history.js";
import { Cards, cardId, modelFaults, readModels, serves } from "/models.js";
import { parse, sum } from "/prometheus.js";
import { clock, count, duration, percent, several } from "/words.js";

const EVERY_S = readEvery(new URLSearchParams(location.search).get("every"));
const WINDOW_S = Math.max(10, 2 * EVERY_S);
const PATIENCE_S = Math.max(5, EVERY_S); // a server of several processes waits 2 s for each answer

const CODES = {
  OK: "good",
  RESOURCE_EXHAUSTED: "orange",
  DEADLINE_EXCEEDED: "purple",
  UNAVAILABLE: "ink",
  CANCELLED: "grey",
  INVALID_ARGUMENT: "sky",
  INTERNAL: "bad",
};
const REASONS = {
  shed: "orange",
  memory: "orange",
  expired: "purple",
  cancelled: "grey",
  invalid: "sky",
  too_large: "sky",
  unknown_method: "sky",
  unavailable: "ink",
  unauthorised: "green",
  failed: "bad",
};
const total = (lines) => [...lines.values()].reduce((all, value) => all + value, 0);
const one = (value) => (value === undefined || value === null ? value : new Map([["", value]]));

const CHARTS = [
  {
    title: "Requests a second",
    read: (point) => point.codes,
    headline: (lines) => count(total(lines)),
    format: count,
    style: (code) => CODES[code] ?? "grey",
    order: Object.keys(CODES),
    absent: "not measured here",
  },
  {
    title: "Time of a request",
    read: ({ median, slowest }) =>
      median === undefined
        ? undefined
        : new Map([
            ["99 %", slowest],
            ["median", median],
          ]),
    note: "99 % within",
    headline: (lines) => duration(lines.get("99 %")),
    format: duration,
    style: (name) => (name === "median" ? "good" : "orange"),
    order: ["median", "99 %"],
    absent: "not measured here",
  },
  {
    title: "Rows a second",
    read: (point) => one(point.rows),
    headline: (lines) => count(total(lines)),
    format: count,
    style: () => "good",
    absent: "not measured here",
  },
  {
    title: "Rows in queues",
    read: (point) => one(point.queue),
    headline: (lines) => count(total(lines)),
    format: count,
    style: () => "good",
    absent: "not measured here",
  },
  {
    title: "Refusals a second",
    read: (point) => point.refusals,
    headline: (lines) => count(total(lines)),
    format: count,
    style: (reason) => REASONS[reason] ?? "grey",
    order: Object.keys(REASONS),
    absent: "not measured here",
  },
  {
    title: "Rows outside of the grid",
    read: (point) => one(point.outside),
    headline: (lines) => percent(lines.get("")),
    format: percent,
    style: () => "purple",
    absent: "not measured here",
  },
];

const WORDS = {
  ready: "Ready",
  draining: "Draining",
  idle: "Not ready",
  unreachable: "Unreachable",
};

const at = (id) => document.getElementById(id);
const history = new History(WINDOW_S);
const cards = new Cards(at("models"));
const charts = CHARTS.map((spec) => new Chart(spec, hover));
let scrape = null; // the last one that was answered, as `parse` gives it
let answered = null; // when, as a Date
let state = "";
let hovered = null; // where the pointer is, as a share of a chart's width from the right

function readEvery(text) {
  const seconds = Number(text);
  return seconds > 0 ? Math.min(3600, Math.max(0.5, seconds)) : 2;
}

const seconds = () => performance.now() / 1000;

async function poll() {
  try {
    scrape = parse(await read());
    answered = new Date();
    history.add(seconds(), scrape);
    show();
  } catch (error) {
    history.miss(seconds());
    showUnreachable(error);
  }
  drawCharts();
  setTimeout(poll, EVERY_S * 1000);
}

async function read() {
  let response, text;
  try {
    const signal = AbortSignal.timeout(PATIENCE_S * 1000);
    response = await fetch("/metrics", { cache: "no-store", signal });
    text = await response.text();
  } catch (error) {
    // Browsers have words of their own for a connection that is refused or lost.
    throw new Error(error.name === "TypeError" ? "no connection" : `no answer in ${PATIENCE_S} s`);
  }
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  return text;
}

function show() {
  const models = readModels(scrape);
  const versions = [...models.values()].flat();
  const processes = [...new Set(scrape.samples.map(({ labels }) => labels.get("worker")))].filter(
    (worker) => worker !== undefined,
  ).length;
  enter(readState(versions), new Date());
  say(
    at("summary"),
    [
      several([...models.values()].filter((of) => of.some(serves)).length, "model") + " served",
      ...(processes ? [several(processes, "process", "processes")] : []),
      `read at ${clock(answered)}`,
    ].join(" · "),
  );
  showFaults([...modelFaults(models), ...serverFaults()]);
  at("no-models").hidden = models.size > 0;
  cards.draw(models, perModel(history, scrape));
}

/** Ready if all processes say so; one that serves models and is not ready is on its way out. */
function readState(versions) {
  const ready = scrape.samples.filter(({ name }) => name === "kanserve_ready");
  const some = versions.some(serves);
  if (ready.length ? ready.every(({ value }) => value === 1) : some) return "ready";
  return some ? "draining" : "idle";
}

function showUnreachable(error) {
  enter("unreachable", answered ?? new Date());
  const shown = answered ? `what is shown was read at ${clock(answered)}` : "nothing was read yet";
  say(at("summary"), `${shown} · ${error.message} · last tried at ${clock(new Date())}`);
}

/** Change over to a state, and say since when if that was seen. */
function enter(next, since) {
  if (next === state) return;
  const first = state === "";
  state = next;
  document.body.dataset.state = state;
  say(at("word"), WORDS[state]);
  say(at("since"), first && state !== "unreachable" ? "" : `since ${clock(since)}`);
  document.title = `${WORDS[state]} · kanserve ${location.host}`;
}

function serverFaults() {
  const faults = [];
  const deaths = sum(scrape.samples, "kanserve_worker_deaths_total");
  if (deaths > 0) {
    faults.push({
      text: `${several(deaths, "process", "processes")} ended and had to be started again, ever`,
    });
  }
  const failed = history.points.reduce((total, point) => total + (point.failed ?? 0), 0);
  if (failed > 0) {
    faults.push({
      text:
        `${several(failed, "call")} failed in the last five minutes by the server's own fault ` +
        "(INTERNAL); its log says more",
    });
  }
  return faults;
}

function showFaults(faults) {
  const key = JSON.stringify(faults);
  if (at("faults").dataset.told === key) return;
  at("faults").dataset.told = key;
  at("attention").hidden = faults.length === 0;
  at("faults").replaceChildren(
    ...faults.map(({ model, text }) => {
      const item = element("li");
      if (model !== undefined) {
        const link = element("a", "", model);
        link.href = `#${encodeURIComponent(cardId(model))}`;
        item.append(link, " ");
      }
      item.append(text);
      return item;
    }),
  );
}

function drawCharts() {
  const { points } = history;
  const now = points.at(-1).time;
  let told = null;
  if (hovered !== null) {
    const time = now - hovered * KEPT_S;
    const distance = (point) => Math.abs(point.time - time);
    told = points.reduce((best, point) => (distance(point) < distance(best) ? point : best));
  }
  say(at("at"), told ? `at ${clock(new Date(Date.now() - (seconds() - told.time) * 1000))}` : "");
  for (const chart of charts) chart.draw(points, now, told);
}

function hover(share) {
  hovered = share;
  if (history.points.length) drawCharts();
}

at("charts").append(...charts.map(({ node }) => node));
say(at("host"), location.host);
say(at("every"), `${EVERY_S} s`);
say(at("window"), `the last ${WINDOW_S} s`);
poll();
