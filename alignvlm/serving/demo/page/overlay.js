// What every patch of the shown image was turned into: cells over the image, and the tokens of one of them beside it.

import { find, make } from "./dom.js";

const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const WIDE = 480; // pixels of the page
const percent = (weight) => `${(100 * weight).toFixed(1)} %`;

export class Overlay {
  constructor() {
    this.view = null;
    this.pinned = null;
    this.heat = null;
    find("tokens").addEventListener("change", () => this._style());
  }

  /** Show an image, without cells until there is a view of it; null shows nothing. */
  show(image) {
    const stage = find("stage");
    this.view = this.svg = this.pinned = this.heat = null;
    find("patch").hidden = true;
    stage.hidden = image === null;
    if (image === null) return stage.replaceChildren();
    const picture = make("img", { src: image.url, alt: image.name });
    if (image.width < WIDE) { // shown larger, so that its patches can be told apart
      picture.classList.add("small");
      picture.style.width = `${Math.min(WIDE, 8 * image.width)}px`;
    }
    this.frame = make("div", { class: "picture" }, picture);
    stage.replaceChildren(this.frame);
  }

  /** Lay a view (see alignvlm/serving/demo/vocabulary.py) over the image that is shown. */
  lay(view) {
    this.view = view;
    this.cells = view.cells.map((cell) => this._cell(cell));
    this.grid = new Map(view.cells.map((cell, i) => [`${cell.row},${cell.column}`, i]));
    const rows = new Map();
    view.cells.forEach((cell, i) => rows.set(cell.row, [...(rows.get(cell.row) ?? []), this.cells[i]]));
    this.svg = make(
      "svg",
      { class: "overlay", viewBox: `0 0 ${view.width} ${view.height}`, preserveAspectRatio: "none", role: "grid", "aria-label": "Patches of the image and their strongest tokens. Arrow keys move from patch to patch." },
      make("rect", { class: "veil", width: view.width, height: view.height }),
      ...[...rows.values()].map((row) => make("g", { role: "row" }, ...row)),
    );
    this.svg.addEventListener("pointerover", (event) => event.pointerType === "mouse" && this._tell(this._at(event)));
    this.svg.addEventListener("pointerleave", () => this._tell(this.pinned));
    this.svg.addEventListener("click", (event) => this._pin(this._at(event)));
    this.svg.addEventListener("focusin", (event) => this._tell(this._at(event)));
    this.svg.addEventListener("keydown", (event) => this._move(event));
    this.cells[0]?.setAttribute("tabindex", "0");
    this.frame.append(this.svg);
    find("patch").hidden = false;
    this._tell(null);
    this._style();
  }

  _cell(cell) {
    const said = cell.top.map(([text, weight]) => `${text} ${percent(weight)}`).join(", ");
    return make(
      "g",
      { class: "cell", role: "gridcell", tabindex: "-1", "aria-label": `Row ${cell.row + 1}, column ${cell.column + 1}: ${said}` },
      make("rect", { x: cell.x + 0.5, y: cell.y + 0.5, width: cell.width - 1, height: cell.height - 1 }),
      make("text", { x: cell.x + cell.width / 2, y: cell.y + cell.height / 2 + 0.35 * cell.font, "font-size": cell.font, "aria-hidden": "true" }, cell.label),
    );
  }

  _at(event) {
    const cell = event.target.closest?.(".cell");
    return cell ? this.cells.indexOf(cell) : null;
  }

  _pin(number) {
    this.pinned = number === this.pinned ? null : number;
    if (number !== null) this._focus(number);
    this._tell(number);
    this._style();
  }

  _focus(number) {
    for (const cell of this.cells) cell.setAttribute("tabindex", "-1");
    this.cells[number].setAttribute("tabindex", "0");
    this.cells[number].focus({ preventScroll: true });
  }

  _move(event) {
    const number = this._at(event);
    if (number === null) return;
    if (event.key === "Enter" || event.key === " ") this._pin(number);
    else if (event.key === "Escape") this._pin(null);
    else if (event.key in MOVES) {
      const { row, column } = this.view.cells[number];
      const next = this.grid.get(`${row + MOVES[event.key][0]},${column + MOVES[event.key][1]}`);
      if (next !== undefined) this._focus(next);
    } else if (event.key === "Home" || event.key === "End") this._focus(event.key === "Home" ? 0 : this.cells.length - 1);
    else return;
    event.preventDefault();
  }

  /** Opacities: of each patch's strongest token, or of one token over all patches. */
  _style() {
    if (!this.svg) return;
    const strongest = this.heat === null ? 1 : Math.max(...this.view.cells.map((cell) => weightOf(cell, this.heat)));
    this.svg.classList.toggle("plain", !find("tokens").checked && this.heat === null);
    this.svg.classList.toggle("heat", this.heat !== null);
    this.cells.forEach((group, number) => {
      const cell = this.view.cells[number];
      const [rect, text] = group.children;
      const share = this.heat === null ? null : weightOf(cell, this.heat) / strongest;
      rect.style.fillOpacity = share === null ? cell.fill : 0.75 * share;
      rect.style.strokeOpacity = share === null ? cell.frame : 0.15;
      text.style.display = share === null ? "" : "none";
      group.classList.toggle("pinned", number === this.pinned);
    });
  }

  /** The tokens of a patch in the panel; without one, what the panel is for. */
  _tell(number) {
    const panel = find("patch");
    const { cells, entropy, vocabulary } = this.view;
    if (number === null) {
      const like = Math.exp(entropy);
      panel.replaceChildren(
        make("h2", {}, "What the patches became"),
        make("p", {}, "Point at a patch, tap it, or reach it by Tab and the arrow keys, and its strongest text tokens stand here with their weights. A click keeps it."),
        make("p", {}, `In the mean over this image a patch spreads as over ${like < 10 ? like.toFixed(1) : Math.round(like).toLocaleString("en")} of ${vocabulary.toLocaleString("en")} tokens (entropy ${entropy.toFixed(2)} nats).`),
        ...(this.heat === null ? [] : [this._stopHeat()]),
      );
      return;
    }
    const cell = cells[number];
    const rest = 1 - cell.top.reduce((sum, [, weight]) => sum + weight, 0);
    panel.replaceChildren(
      make("h2", {}, `Patch in row ${cell.row + 1}, column ${cell.column + 1}`, make("small", {}, `entropy ${cell.entropy.toFixed(2)} nats`)),
      make("ol", {}, ...cell.top.map(([text, weight]) => make("li", {}, this._token(text, weight)))),
      make("p", {}, `All other tokens together: ${percent(Math.max(0, rest))}.`, " Choose a token to see where else it is, once more to see all."),
      ...(this.heat === null ? [] : [this._stopHeat()]),
    );
  }

  _token(text, weight) {
    const bar = make("span", { class: "bar" });
    bar.style.setProperty("--value", `${100 * weight}%`);
    const choose = () => {
      this.heat = this.heat === text ? null : text;
      this._style();
      for (const button of find("patch").querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", String(button === pressed && this.heat !== null));
    };
    const pressed = make("button", { type: "button", "aria-pressed": String(this.heat === text), title: text, click: choose }, make("code", {}, text), bar, make("span", { class: "n" }, percent(weight)));
    return pressed;
  }

  _stopHeat() {
    const stop = () => {
      this.heat = null;
      this._style();
      this._tell(this.pinned);
    };
    return make("button", { type: "button", class: "quiet", click: stop }, `Show all tokens instead of “${this.heat}”`);
  }
}

const weightOf = (cell, token) => cell.top.find(([text]) => text === token)?.[1] ?? 0;
