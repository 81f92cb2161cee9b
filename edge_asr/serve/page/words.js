// The words of the page, in English and Chinese.
const WORDS = {
  en: {
    skip: "Skip to the captions", captions: "What is said", nothing: "Speak: what is said appears here.",
    mute: "Mute", muted: "Muted – unmute", talk: "Push to talk", talking: "Listening…",
    everybody: "Everybody is heard all the time (listen.mode: always)",
    preset: "A sentence ends after", aggressive: "a short pause (160 ms)", default: "a pause (384 ms)", relaxed: "a long pause (800 ms)",
    latency: "Where the time goes", stages: "The last sentences, by stage", stage: "Stage",
    pause: "waiting for the pause", queue: "queue", features: "features", encoder: "encoder", cif: "CIF", decoder: "decoder",
    model: "model", publish: "publication", response: "response, from the end of the sentence", total: "total, from the end of speech",
    summary: "{count} sentences: response p50 {p50} ms, p95 {p95} ms, p99 {p99} ms; {late} later than {budget} ms.",
    none: "No sentence yet.", ended: "the sentence has ended", budget: "the budget: {budget} ms",
    health: "How it is", broker: "Broker", engine: "Engine", name: "Model", device: "Machine", outbox: "Outbox",
    connected: "connected", away: "not connected", off: "not used", waiting: "{count} transcripts wait", empty: "nothing waits",
    file: "A recording", choose: "Choose a file", drop: "or drop it here: any audio format, or a video.",
    working: "Recognising {name} …", done: "{name}: {seconds} s", silence: "nothing is said in it", text: "Text",
    lost: "(lost: there was no time to recognise it)", late: "late", logout: "Log out", theme: "Light or dark",
    unreachable: "The appliance does not answer; the page keeps trying.", listening: "listening", level: "Level of {name}",
    states: {ready: "ready", degraded: "degraded", starting: "starting", away: "not reached"},
    healths: {listening: "listening", waiting: "waiting for it", stalled: "stalled", muted: "muted", ended: "ended", failed: "failed"},
  },
  zh: {
    skip: "跳到字幕", captions: "实时字幕", nothing: "请说话：内容会显示在这里。",
    mute: "静音", muted: "已静音 – 取消", talk: "按住说话", talking: "正在听…",
    everybody: "一直在听所有人 (listen.mode: always)",
    preset: "断句停顿", aggressive: "短 (160 毫秒)", default: "中 (384 毫秒)", relaxed: "长 (800 毫秒)",
    latency: "时间花在哪里", stages: "最近的句子，按阶段", stage: "阶段",
    pause: "等待停顿", queue: "排队", features: "特征", encoder: "编码器", cif: "CIF", decoder: "解码器",
    model: "模型", publish: "发布", response: "响应（从断句起）", total: "总计（从说完起）",
    summary: "{count} 句：响应 p50 {p50} 毫秒，p95 {p95} 毫秒，p99 {p99} 毫秒；{late} 句超过 {budget} 毫秒。",
    none: "还没有句子。", ended: "断句", budget: "预算：{budget} 毫秒",
    health: "运行状况", broker: "MQTT 代理", engine: "引擎", name: "模型", device: "设备", outbox: "发件箱",
    connected: "已连接", away: "未连接", off: "未使用", waiting: "{count} 条待发", empty: "无待发",
    file: "录音文件", choose: "选择文件", drop: "或拖放到这里：任何音频格式或视频。",
    working: "正在识别 {name} …", done: "{name}：{seconds} 秒", silence: "其中没有语音", text: "文本",
    lost: "（丢失：来不及识别）", late: "迟", logout: "退出", theme: "浅色或深色",
    unreachable: "设备没有响应；页面会继续尝试。", listening: "正在听", level: "{name} 的电平",
    states: {ready: "就绪", degraded: "异常", starting: "启动中", away: "无法连接"},
    healths: {listening: "正在听", waiting: "等待设备", stalled: "停滞", muted: "静音", ended: "结束", failed: "失败"},
  },
};

let chosen = localStorage.getItem("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en");

// Return a word, with what stands for {name} in its place.
export function word(key, values = {}) {
  return WORDS[chosen][key].replace(/{(\w+)}/g, (_, name) => values[name]);
}

export const stateWord = (state) => WORDS[chosen].states[state] ?? state;
export const healthWord = (health) => WORDS[chosen].healths[health] ?? health;
export const locale = () => (chosen === "zh" ? "zh-CN" : "en-GB");

// Write the words of the present language into the page.
export function translate() {
  document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", word(element.dataset.label));
  const other = document.getElementById("language");
  other.textContent = chosen === "zh" ? "English" : "中文";
  other.lang = chosen === "zh" ? "en" : "zh-CN";
}

export function useOtherLanguage() {
  chosen = chosen === "zh" ? "en" : "zh";
  localStorage.setItem("language", chosen);
  translate();
}
