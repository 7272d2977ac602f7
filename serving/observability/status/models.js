// The models of a server: what is known of each version, and how it is shown.
//
// Processes of one server tell the same of a version, each under its own `worker`; what describes
// it is taken once, and where they differ in its state all of it is shown.

import { element, say } from "/chart.js";
import { count, duration, percent, several } from "/words.js";

// A version in one of these states is as its operator wanted it.
const WANTED = ["the version policy is ", "it was unloaded"];
const REPORT = /^\/reports\/[A-Za-z0-9._-]+\/[0-9]+$/; // never another site, never a script

/**
 * Read what a scrape says of models.
 * @returns {Map<string, Array>} By name, in order: versions, newest first, as {model, version,
 *   states, executions, providers, parity, sha256, report, threshold, accepts}. `states` are {state, reason, workers}.
 */
export function readModels({ samples }) {
  const models = new Map();
  for (const { name, labels, value } of samples) {
    if (!name.startsWith("kanserve_model_")) continue;
    const of = labels.get("model") ?? "";
    if (!models.has(of)) models.set(of, new Map());
    const versions = models.get(of);
    const number = labels.get("version") ?? "";
    if (!versions.has(number)) versions.set(number, emptyVersion(of, number));
    const version = versions.get(number);
    if (name === "kanserve_model_state" && value === 1) {
      const [state, reason] = [labels.get("state") ?? "", labels.get("reason") ?? ""];
      const same = version.states.find((one) => one.state === state && one.reason === reason);
      if (same) same.workers += 1;
      else version.states.push({ state, reason, workers: 1 });
    } else if (name === "kanserve_model_kan_layers") {
      version.executions.set(labels.get("execution"), value);
    } else if (name === "kanserve_model_nodes") {
      version.providers.set(labels.get("provider"), value);
    } else if (name === "kanserve_model_parity") {
      version.parity.set(labels.get("runtime"), value);
    } else if (name === "kanserve_model_info") {
      version.sha256 = labels.get("sha256") ?? "";
      version.threshold = labels.get("prune_threshold") ?? "";
      version.accepts = labels.get("accepts") ?? "";
      version.report = REPORT.test(labels.get("report")) ? labels.get("report") : "";
    }
  }
  const sorted = [...models].sort(([one], [other]) => (one < other ? -1 : 1));
  return new Map(
    sorted.map(([name, versions]) => [name, [...versions.values()].sort(newestFirst)]),
  );
}

function emptyVersion(model, version) {
  return {
    model,
    version,
    states: [],
    executions: new Map(),
    providers: new Map(),
    parity: new Map(),
    sha256: "",
    report: "",
    threshold: "",
    accepts: "",
  };
}

function newestFirst(one, other) {
  // Numbers of up to 18 digits, which are more than a double holds.
  const [a, b] = [one.version, other.version];
  if (a.length !== b.length) return b.length - a.length;
  return a < b ? 1 : -1;
}

const isReady = ({ state }) => state === "READY";
const isWanted = ({ state, reason }) =>
  state === "UNAVAILABLE" && WANTED.some((start) => reason.startsWith(start));
export const serves = (version) => version.states.some(isReady);

/** Whether a version is left out on purpose, everywhere. */
const isQuiet = (version) => version.states.length > 0 && version.states.every(isWanted);

/** What is wrong with models, in words. */
export function modelFaults(models) {
  const faults = [];
  for (const [name, versions] of models) {
    const serving = versions.filter(serves).map(({ version }) => version);
    for (const { version, states } of versions) {
      const ready = states.filter(isReady).length > 0;
      for (const { state, reason, workers } of states) {
        const where = states.length > 1 ? ` (${several(workers, "process", "processes")})` : "";
        if (isReady({ state }) && reason) {
          faults.push({
            model: name,
            text:
              `version ${version} serves, but what lies in its folder now does not${where}: ` +
              reason,
          });
        } else if (state === "UNAVAILABLE" && !isWanted({ state, reason })) {
          const instead = serving.length && !ready ? `; version ${serving.join(", ")} serves` : "";
          faults.push({
            model: name,
            text:
              `version ${version} is not served${where}: ` +
              (reason || "no reason is known") +
              instead,
          });
        }
      }
    }
  }
  return faults;
}

/** An element's id of a model's card. */
export const cardId = (name) => `model-${name}`;

/** The cards of all models. */
export class Cards {
  constructor(node) {
    this.node = node;
    this.cards = new Map();
  }

  /**
   * Show models.
   * @param {Map} models From `readModels`.
   * @param {function(string)} live What each does now, from `perModel`.
   */
  draw(models, live) {
    for (const [name, { card }] of this.cards) {
      if (!models.has(name)) {
        card.remove();
        this.cards.delete(name);
      }
    }
    let before = null;
    for (const [name, versions] of models) {
      if (!this.cards.has(name)) this.cards.set(name, makeCard(name));
      const { card, facts, versionsNode, ...kept } = this.cards.get(name);
      // What does not change is left alone: somebody may be reading or selecting it.
      const told = JSON.stringify(versions, (_, value) =>
        value instanceof Map ? [...value] : value,
      );
      if (told !== kept.told) {
        this.cards.get(name).told = told;
        versionsNode.replaceChildren(...versionRows(name, versions));
      }
      const now = live(name);
      say(facts.rows, count(now.rows));
      say(facts.median, duration(now.median));
      say(facts.slowest, duration(now.slowest));
      say(facts.queue, count(now.queue));
      say(facts.outside, percent(now.outside));
      const next = before ? before.nextSibling : this.node.firstChild;
      if (card !== next) this.node.insertBefore(card, next);
      before = card;
    }
  }
}

function makeCard(name) {
  const card = element("article", "model");
  card.id = cardId(name);
  const head = element("div", "head");
  const list = element("dl", "facts");
  const facts = {};
  for (const [key, words] of [
    ["rows", "rows/s"],
    ["median", "median"],
    ["slowest", "99 %"],
    ["queue", "rows queued"],
    ["outside", "out of grid since start"],
  ]) {
    const pair = element("div");
    facts[key] = element("dd", "", "–");
    pair.append(element("dt", "", words), facts[key]);
    list.append(pair);
  }
  head.append(element("h3", "", name), list);
  const versionsNode = element("div", "versions");
  card.append(head, versionsNode);
  return { card, facts, versionsNode, told: "" };
}

const NOTHING = "–";
const COLUMNS = [
  "Version",
  "State",
  "KAN layers",
  "Graph nodes run on",
  "Parity at export",
  "Report",
];

function versionRows(name, versions) {
  const shown = versions.filter((version) => !isQuiet(version));
  const nodes = [];
  if (shown.length) {
    // Roles, because a narrow screen shows rows as blocks, which are no table to a screen reader.
    const table = role(element("table"), "table");
    table.append(element("caption", "hidden", `Versions of ${name}`));
    const head = role(element("thead"), "rowgroup");
    const titles = role(element("tr"), "row");
    for (const title of COLUMNS) {
      const cell = role(element("th", "", title), "columnheader");
      cell.scope = "col";
      titles.append(cell);
    }
    head.append(titles);
    const body = role(element("tbody"), "rowgroup");
    body.append(...shown.map(versionRow));
    table.append(head, body);
    nodes.push(table);
  }
  const byReason = new Map();
  for (const { version, states } of versions.filter(isQuiet)) {
    const reason = states[0].reason;
    byReason.set(reason, [...(byReason.get(reason) ?? []), version]);
  }
  for (const [reason, numbers] of byReason) {
    const which = `${numbers.length === 1 ? "Version" : "Versions"} ${numbers.join(", ")}`;
    nodes.push(element("p", "quiet", `${which} not served: ${reason}`));
  }
  return nodes;
}

function versionRow(version) {
  const row = role(element("tr"), "row");
  const number = role(element("th", "number"), "rowheader");
  number.scope = "row";
  number.append(element("span", "", version.version));
  if (version.sha256) {
    const digest = element("code", "", version.sha256.slice(0, 12));
    digest.title = `SHA-256 of model.onnx: ${version.sha256}`;
    number.append(digest);
  }
  const cells = [
    stateCell(version),
    layersCell(version),
    [element("span", "", providersInWords(version.providers))],
    parityCell(version.parity),
    [reportCell(version)],
  ].map((content, i) => {
    const cell = role(element("td"), "cell");
    cell.dataset.title = COLUMNS[i + 1];
    const inner = element("div");
    inner.append(...content);
    if (inner.textContent === NOTHING) cell.classList.add("nothing");
    cell.append(inner);
    return cell;
  });
  row.append(number, ...cells);
  return row;
}

function role(node, name) {
  node.setAttribute("role", name);
  return node;
}

const STATES = {
  READY: ["ready", "Ready"],
  LOADING: ["loading", "Loading"],
  UNAVAILABLE: ["failed", "Not served"],
};

function stateCell({ states, accepts }) {
  const cell = states.map(({ state, reason, workers }) => {
    const [kind, words] = STATES[state] ?? ["unknown", state];
    const node = element("span", "version-state");
    const lamp = element("span", `lamp ${kind}`);
    lamp.setAttribute("aria-hidden", "true");
    const where = states.length > 1 ? ` in ${several(workers, "process", "processes")}` : "";
    const text = element("span", "", words + where);
    if (reason) text.append(element("span", "reason", reason));
    node.append(lamp, text);
    return node;
  });
  if (accepts) {
    const rules = element("span", "reason", `accepts ${accepts}`);
    rules.title = "A request with other values is invalid: a runtime would answer it wrongly.";
    cell.push(rules);
  }
  return cell;
}

function layersCell({ executions, threshold }) {
  const cell = [element("span", "", layersInWords(executions))];
  if (threshold) {
    const pruned = element("span", "reason", `pruned at ${threshold}`);
    pruned.title = "Edges were left out: this is another function than the checkpoint's.";
    cell.push(pruned);
  }
  return cell;
}

function layersInWords(executions) {
  const parts = [...executions].filter(([, number]) => number > 0);
  return parts.map(([execution, number]) => `${count(number)} ${execution}`).join(", ") || NOTHING;
}

function providersInWords(providers) {
  const parts = [...providers].filter(([, number]) => number > 0);
  const short = (provider) => provider.replace(/ExecutionProvider$/, "");
  return (
    parts.map(([provider, number]) => `${count(number)} on ${short(provider)}`).join(", ") ||
    NOTHING
  );
}

function parityCell(parity) {
  if (!parity.size) return [element("span", "", NOTHING)];
  const details = element("details");
  const worst = Math.max(...parity.values());
  details.append(element("summary", "", `${percent(worst)} of allowed`));
  const list = element("ul");
  for (const [runtime, share] of parity) {
    const item = element("li");
    item.append(element("span", "", runtime), element("span", "", percent(share)));
    list.append(item);
  }
  details.append(list);
  return [details];
}

function reportCell({ model, version, report }) {
  if (!report) return element("span", "", NOTHING);
  const link = element("a", "", "Report");
  link.href = report;
  link.setAttribute("aria-label", `Report of ${model}, version ${version}`);
  return link;
}
