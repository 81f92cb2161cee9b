// A recording is dropped, or chosen: its transcript, when it was said, and subtitles to take away.
import {make} from "./captions.js";
import {word} from "./words.js";

const area = document.getElementById("drop");
const chooser = document.getElementById("file");
const result = document.getElementById("result");
let urls = [];

export function watchFiles() {
  chooser.addEventListener("change", () => chooser.files.length && recognize(chooser.files[0]));
  for (const kind of ["dragenter", "dragover"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      area.classList.add("over");
    });
  }
  addEventListener("dragleave", (event) => event.relatedTarget ?? area.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    area.classList.remove("over");
    if (event.dataTransfer.files.length) recognize(event.dataTransfer.files[0]);
  });
}

async function recognize(file) {
  chooser.value = "";
  const progress = make("progress");
  progress.setAttribute("aria-label", word("working", {name: file.name}));
  show(make("p", "", word("working", {name: file.name})), progress);
  area.scrollIntoView({block: "nearest"});
  const form = new FormData();
  form.append("model", "whisper-1");
  form.append("response_format", "verbose_json");
  form.append("file", file);
  try {
    const answer = await fetch("v1/audio/transcriptions", {method: "POST", body: form});
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error.message);
    showResult(file.name, found);
  } catch (error) {
    show(make("p", "late", error.message));
  }
}

function showResult(name, {text, duration, segments}) {
  const list = make("ol");
  list.tabIndex = 0;
  for (const cue of segments) {
    const line = make("li");
    line.append(make("span", "meta", `${clock(cue.start, ".")} – ${clock(cue.end, ".")}`), make("span", "", cue.text));
    list.append(line);
  }
  const title = make("p", "", word("done", {name, seconds: duration.toFixed(1)}));
  if (!text) return show(title, make("p", "quiet", word("silence")));
  const base = name.replace(/\.[^.]*$/, "");
  const downloads = make("p");
  downloads.append(
    download(`${base}.srt`, "application/x-subrip", srt(segments), "SRT"),
    download(`${base}.vtt`, "text/vtt", vtt(segments), "WebVTT"),
    download(`${base}.txt`, "text/plain", `${text}\n`, word("text")),
  );
  show(title, list, downloads);
}

function show(...elements) {
  urls.forEach(URL.revokeObjectURL);
  urls = elements.flatMap((element) => [...element.querySelectorAll("a")].map((link) => link.href));
  result.replaceChildren(...elements);
}

function download(name, type, content, label) {
  const link = make("a", "", label);
  link.href = URL.createObjectURL(new Blob([content], {type: `${type};charset=utf-8`}));
  link.download = name;
  return link;
}

export function srt(cues) {
  return cues.map(({start, end, text}, k) => `${k + 1}\n${clock(start, ",")} --> ${clock(end, ",")}\n${text}\n\n`).join("");
}

export function vtt(cues) {
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const blocks = cues.map(({start, end, text}) => `${clock(start, ".")} --> ${clock(end, ".")}\n${escaped(text)}\n\n`);
  return ["WEBVTT\n\n", ...blocks].join("");
}

function clock(seconds, mark) {
  const ms = Math.round(seconds * 1000);
  const [hours, minutes, whole] = [Math.floor(ms / 3.6e6), Math.floor(ms / 6e4) % 60, Math.floor(ms / 1000) % 60];
  const two = (number) => String(number).padStart(2, "0");
  return `${two(hours)}:${two(minutes)}:${two(whole)}${mark}${String(ms % 1000).padStart(3, "0")}`;
}
