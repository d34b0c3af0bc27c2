// Elements without markup: text that came from a model, a file or a server is always text.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "g", "rect", "text"]);

export const find = (id) => document.getElementById(id);

/** An element with these attributes (functions are listeners; null and false leave one out) and children. */
export function make(tag, attributes = {}, ...children) {
  const made = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A message that stays until it is closed. */
export function alert(text) {
  const box = make("div", { class: "alert" }, make("span", {}, text));
  box.append(make("button", { type: "button", "aria-label": "Close this message", click: () => box.remove() }, "✕"));
  for (const old of find("alerts").children) if (old.firstChild.textContent === text) old.remove();
  find("alerts").append(box);
}

export const clearAlerts = () => find("alerts").replaceChildren();
