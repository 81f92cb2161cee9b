// What is said: partials grey, finals black. Everything is text, whatever is in it.
import {locale, word} from "./words.js";

const KEPT = 200;
const finals = document.getElementById("finals");
const partials = document.getElementById("partials");
const region = document.getElementById("captions");
const open = new Map(); // the partials that are shown, by id

export function make(tag, kind, text) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
}

export function showPartial(partial) {
  if (partial.end) return forget(partial.id);
  following(() => {
    if (!open.has(partial.id)) {
      open.set(partial.id, partials.appendChild(make("p")));
      open.get(partial.id).append(make("span", "meta", partial.source), make("span", "text"));
    }
    open.get(partial.id).lastChild.textContent = partial.text;
    document.getElementById("nothing").hidden = true;
  });
}

export function showFinal(said) {
  following(() => {
    forget(said.id);
    const line = make("p");
    const at = said.start ? new Date(said.start).toLocaleTimeString(locale()) : "";
    const response = said.latency_ms.response === undefined ? "" : `${said.latency_ms.response.toFixed(0)} ms`;
    line.append(make("span", "meta", [at, said.source, response].filter(Boolean).join(" · ")));
    if (said.within_budget === false) line.append(make("span", "meta late", word("late")));
    line.append(make("span", "text", said.lost ? word("lost") : said.text));
    finals.append(line);
    while (finals.children.length > KEPT) finals.firstChild.remove();
    document.getElementById("nothing").hidden = true;
  });
}

export function forgetPartials() {
  for (const id of [...open.keys()]) forget(id);
}

function forget(id) {
  open.get(id)?.remove();
  open.delete(id);
}

// Change what is shown, and stay at the end if that is where the reader is.
function following(change) {
  const atEnd = region.scrollHeight - region.scrollTop - region.clientHeight < 60;
  change();
  if (atEnd) region.scrollTop = region.scrollHeight;
}
