// The page: it is told everything by the WebSocket /captions, and asks for changes with POST /admin/….
import {forgetPartials, make, showFinal, showPartial} from "./captions.js";
import {watchFiles} from "./files.js";
import {addSentence, draw, setHistory} from "./latency.js";
import {healthWord, stateWord, translate, useOtherLanguage, word} from "./words.js";

const QUIETEST_DB = -60;
const RETRY_MS = [500, 10_000];
const TAP_MS = 400;
const byId = (id) => document.getElementById(id);
let state = null;
let retryMs = RETRY_MS[0];

function budgetMs() { return state?.budget?.response_ms ?? 300; }

const handlers = {
  hello({login}) {
    byId("logout").hidden = !login;
  },
  state(message) {
    state = message;
    showState();
  },
  history({sentences}) {
    setHistory(sentences);
    draw(budgetMs());
  },
  partial: showPartial,
  said(said) {
    showFinal(said);
    addSentence(said);
    draw(budgetMs());
  },
  levels({levels}) {
    for (const [name, level] of Object.entries(levels)) {
      const meter = document.querySelector(`meter[data-source="${CSS.escape(name)}"]`);
      if (meter) meter.value = Math.max(level, QUIETEST_DB);
    }
  },
};

function connect() {
  const address = new URL("captions", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(address);
  socket.addEventListener("message", ({data}) => {
    retryMs = RETRY_MS[0];
    const message = JSON.parse(data);
    handlers[message.type]?.(message);
  });
  socket.addEventListener("close", lost);
}

// Try again, ever less often; who is not logged in any more is asked for the token.
async function lost() {
  forgetPartials();
  state = null;
  showState();
  setTimeout(connect, retryMs);
  retryMs = Math.min(2 * retryMs, RETRY_MS[1]);
  const answer = await fetch("admin/state").catch(() => null);
  if (answer?.status === 401) location.reload();
}

function showState() {
  const name = state?.state ?? "away";
  byId("state-name").textContent = stateWord(name);
  byId("state-name").dataset.state = name;
  byId("why").textContent = state ? state.why : word("unreachable");
  for (const control of ["mute", "preset", "talk"]) byId(control).disabled = !state;
  if (!state) return;
  byId("device").textContent = state.device_id;
  document.title = `${state.device_id} · edge_asr`;
  byId("version").textContent = `edge_asr ${state.version}`;
  byId("mute").setAttribute("aria-pressed", state.mute);
  byId("mute").textContent = word(state.mute ? "muted" : "mute");
  byId("preset").value = state.preset;
  byId("talk").disabled = state.listen === "always";
  byId("talk").title = state.listen === "always" ? word("everybody") : "";
  showLevels();
  showHealth();
}

function showLevels() {
  const shown = [...document.querySelectorAll("meter")].map((meter) => meter.dataset.source).join("\n");
  if (shown === state.sources.map(({name}) => name).join("\n")) return;
  byId("levels").replaceChildren(...state.sources.map(({name}) => {
    const line = make("div", "level"), meter = make("meter");
    Object.assign(meter, {min: QUIETEST_DB, low: -9, high: -3, optimum: -20, max: 0, value: QUIETEST_DB});
    meter.dataset.source = name;
    meter.setAttribute("aria-label", word("level", {name}));
    line.append(make("span", "quiet", name), meter);
    return line;
  }));
}

function showHealth() {
  const {broker, outbox, engine, model, device} = state;
  const rows = state.sources.map(({name, health, why}) => [name, [healthWord(health), why].filter(Boolean).join(": ")]);
  rows.push([word("broker"), broker === null ? word("off") : brokerText(broker)]);
  if (broker !== null) rows.push([word("outbox"), outbox.pending ? word("waiting", {count: outbox.pending}) : word("empty")]);
  rows.push([word("name"), model], [word("engine"), engine ?? "–"]);
  const machine = [
    device.temperature_c == null ? "" : `${device.temperature_c.toFixed(0)} °C`,
    device.power_mode ?? "",
    device.memory_available_mb == null ? "" : `${device.memory_available_mb.toFixed(0)} MB RAM`,
  ].filter(Boolean);
  if (machine.length) rows.push([word("device"), machine.join(" · ")]);
  byId("health").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
}

function brokerText({connected, last_failure: failure}) {
  return connected ? word("connected") : [word("away"), failure].filter(Boolean).join(": ");
}

// Ask for a change; what is refused is told.
async function ask(command, wish) {
  byId("notice").textContent = "";
  try {
    const body = JSON.stringify(wish);
    const answer = await fetch(`admin/${command}`, {method: "POST", headers: {"content-type": "application/json"}, body});
    const found = await answer.json();
    if (answer.ok) return found;
    byId("notice").textContent = found.error.message;
  } catch {
    byId("notice").textContent = word("unreachable");
  }
  if (state) showState(); // as it is, not as it was wished
  return null;
}

// As long as the button is held, or for the configured time after a tap.
class Talk {
  constructor(button) {
    this.button = button;
    button.addEventListener("pointerdown", () => this.begin());
    for (const kind of ["pointerup", "pointercancel", "pointerleave"]) button.addEventListener(kind, () => this.end());
    button.addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && !event.repeat && this.begin());
    button.addEventListener("keyup", (event) => [" ", "Enter"].includes(event.key) && this.end());
    button.addEventListener("contextmenu", (event) => event.preventDefault()); // a long touch
    button.addEventListener("blur", () => this.end());
  }

  async begin() {
    if (this.button.disabled || this.since) return;
    this.since = performance.now();
    this.show(true);
    await this.listen();
  }

  async listen() {
    const answer = await ask("listen", {});
    clearTimeout(this.timer);
    if (!answer?.seconds) return this.show(false);
    this.timer = setTimeout(() => (this.since ? this.listen() : this.show(false)), (answer.seconds - 0.5) * 1000);
  }

  async end() {
    const held = this.since && performance.now() - this.since > TAP_MS;
    this.since = null;
    if (!held) return;
    clearTimeout(this.timer);
    this.show(false);
    await ask("listen", {seconds: 0});
  }

  show(on) {
    this.button.classList.toggle("on", on);
    this.button.textContent = word(on ? "talking" : "talk");
  }
}

function useTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

function otherTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const present = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  const theme = present === "dark" ? "light" : "dark";
  localStorage.setItem("theme", theme);
  useTheme(theme);
}

useTheme(localStorage.getItem("theme"));
translate();
byId("language").addEventListener("click", () => {
  useOtherLanguage();
  byId("levels").replaceChildren();
  if (state) showState();
  draw(budgetMs());
});
byId("theme").addEventListener("click", otherTheme);
byId("mute").addEventListener("click", () => state && ask("mute", {mute: !state.mute}));
byId("preset").addEventListener("change", ({target}) => ask("preset", {preset: target.value}));
new Talk(byId("talk"));
new ResizeObserver(() => draw(budgetMs())).observe(byId("latency-title"));
watchFiles();
connect();
