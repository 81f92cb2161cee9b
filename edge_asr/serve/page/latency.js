// The last sentences as a picture: each is a column of time, from the end of speech at its foot up to its message.
import {make} from "./captions.js";
import {word} from "./words.js";

const MOST = 200;
const HEIGHT = 240, FEWEST = 60;
const LONGEST_PAUSE = 1.4; // of the budget: a longer one is cut off at the foot
const POST_ROLL_MS = 96; // so long after the end of speech it is decoded
const STAGES = ["queue", "features", "encoder", "cif", "decoder", "model"];
const ROWS = ["pause", ...STAGES, "publish", "response", "total"];
const SVG = "http://www.w3.org/2000/svg";
let sentences = [];

export function setHistory(history) { sentences = history.slice(-MOST); }

export function addSentence(sentence) {
  sentences = [...sentences, sentence].slice(-MOST);
}

// Return the parts of a column: [stage, from, to], in milliseconds after the segment has ended.
export function parts({latency_ms: spent, decoded_at_pause: atPause}) {
  const endpoint = spent.endpoint ?? 0, response = Math.max(0, spent.response);
  let now = atPause ? Math.min(0, POST_ROLL_MS - endpoint) : 0;
  const found = [["pause", -endpoint, now]];
  for (const stage of STAGES) {
    const end = Math.min(now + (spent[stage] ?? 0), response);
    found.push([stage, now, end]);
    now = end;
  }
  if (now < 0) found.push(["pause", now, 0]);
  found.push(["publish", Math.max(now, 0), response]);
  return found.filter(([, from, to]) => to > from);
}

// Draw the picture and its table anew.
export function draw(budgetMs) {
  const timed = sentences.filter(({latency_ms: spent, lost}) => !lost && spent.response !== undefined);
  const summary = summaryOf(timed, budgetMs);
  document.getElementById("summary").textContent = summary;
  document.getElementById("picture").replaceChildren(...(timed.length ? [picture(timed, budgetMs, summary)] : []));
  document.querySelector("#stages tbody").replaceChildren(...ROWS.flatMap((stage) => row(stage, timed)));
  document.getElementById("stages").hidden = !timed.length;
}

function summaryOf(timed, budget) {
  if (!timed.length) return word("none");
  const responses = timed.map(({latency_ms: spent}) => spent.response);
  const late = timed.filter(({within_budget: inTime}) => inTime === false).length;
  const [p50, p95, p99] = [0.5, 0.95, 0.99].map((share) => percentile(responses, share).toFixed(0));
  return word("summary", {count: timed.length, p50, p95, p99, late, budget});
}

function picture(timed, budget, summary) {
  const width = document.getElementById("picture").clientWidth;
  const below = Math.min(LONGEST_PAUSE * budget, Math.max(100, ...timed.map(({latency_ms: spent}) => spent.endpoint ?? 0)));
  const above = Math.min(3 * budget, Math.max(1.2 * budget, ...timed.map(({latency_ms: spent}) => spent.response)));
  const y = (ms) => (HEIGHT * (above - Math.min(Math.max(ms, -below), above))) / (above + below);
  const svg = shape("svg", {width, height: HEIGHT, role: "img", "aria-label": summary});
  const step = width / Math.max(timed.length, FEWEST);
  timed.forEach((sentence, k) => {
    for (const [stage, from, to] of parts(sentence)) {
      const at = {x: k * step, y: y(to), width: Math.max(step * 0.8, 1), height: Math.max(y(from) - y(to), 0.8)};
      svg.append(shape("rect", {class: stage, ...at}));
    }
  });
  for (const [kind, ms, text] of [["line", budget, word("budget", {budget})], ["zero", 0, word("ended")]]) {
    svg.append(shape("line", {class: kind, x1: 0, x2: width, y1: y(ms), y2: y(ms)}));
    const label = shape("text", {x: width - 2, y: y(ms) - 5, "text-anchor": "end"});
    label.textContent = text;
    svg.append(label);
  }
  return svg;
}

function row(stage, timed) {
  const spent = timed.map((sentence) => of(stage, sentence)).filter((ms) => ms !== undefined);
  if (!spent.length) return [];
  const line = make("tr"), head = make("th");
  head.scope = "row";
  head.append(make("span", `key ${stage}`), word(stage));
  line.append(head, ...[0.5, 0.95].map((share) => make("td", "", percentile(spent, share).toFixed(1))));
  return [line];
}

function of(stage, sentence) {
  if (stage !== "pause" && stage !== "publish") return sentence.latency_ms[stage];
  return parts(sentence).reduce((sum, [name, from, to]) => sum + (name === stage ? to - from : 0), 0);
}

function percentile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
}

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
