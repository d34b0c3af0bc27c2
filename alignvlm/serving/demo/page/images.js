// The images of the question: from files, the clipboard, a drop or an example; their thumbnails; which one is shown.

import { alert, find, make } from "./dom.js";

const MEGABYTE = 1024 * 1024;

export class Images {
  /** limits: {bytes, images} of a question. onChange(): the images are others; onShow(image or null): another is shown. */
  constructor(limits, onChange, onShow) {
    this.limits = limits;
    this.onChange = onChange;
    this.onShow = onShow;
    this.list = [];
    this.shown = null;
    this._listen();
  }

  /** Add what is an image and not too large; everything else is named in an alert. */
  async add(files) {
    const added = [];
    for (const file of files) {
      try {
        if (this.list.length + added.length >= this.limits.images) {
          throw new Error(`${file.name}: a question takes at most ${this.limits.images} images.`);
        }
        added.push(await this._read(file, [...this.list, ...added]));
      } catch (error) {
        alert(error.message);
      }
    }
    if (added.length) this._set([...this.list, ...added], added[0]);
    return added.length;
  }

  clear() {
    for (const image of this.list) URL.revokeObjectURL(image.url);
    this._set([], null);
  }

  /** Remove the image that is shown; its neighbour is shown then. */
  removeShown() {
    const position = this.list.indexOf(this.shown);
    const left = this.list.filter((image) => image !== this.shown);
    URL.revokeObjectURL(this.shown.url);
    this._set(left, left[Math.min(position, left.length - 1)] ?? null);
    find(left.length ? "remove" : "drop").focus();
  }

  show(image) {
    this.shown = image;
    this.list.forEach((other, number) => find("thumbs").children[number]?.firstChild.setAttribute("aria-pressed", String(other === image)));
    this.onShow(image);
  }

  async _read(file, others) {
    const name = file.name || "The pasted image";
    const bytes = others.reduce((sum, other) => sum + other.file.size, file.size);
    if (bytes > this.limits.bytes) {
      const [size, all, most] = [file.size, bytes, this.limits.bytes].map((n) => (n / MEGABYTE).toFixed(1));
      const withOthers = others.length ? `, ${all} MB with the other images` : "";
      throw new Error(`${name} is too large: ${size} MB${withOthers}, and a question takes ${most} MB.`);
    }
    const url = URL.createObjectURL(file);
    const picture = new Image();
    picture.src = url;
    try {
      await picture.decode();
    } catch {
      URL.revokeObjectURL(url);
      const reason = file.type === "application/pdf" ? "it is a PDF: save its pages as PNG" : "it is damaged, or neither PNG, JPEG, WebP, GIF nor BMP";
      throw new Error(`${name} cannot be read as an image: ${reason}.`);
    }
    return { name, url, file, width: picture.naturalWidth };
  }

  _set(list, shown) {
    this.list = list;
    find("drop").hidden = list.length > 0;
    find("remove").hidden = list.length === 0;
    find("thumbs").replaceChildren(...(list.length > 1 ? list : []).map((image, number) => this._thumb(image, number)));
    this.onChange();
    this.show(shown);
  }

  _thumb(image, number) {
    const label = `Image ${number + 1}: ${image.name}`;
    const picture = make("img", { src: image.url, alt: "" });
    return make("li", {}, make("button", { type: "button", "aria-label": label, title: image.name, click: () => this.show(image) }, picture));
  }

  _listen() {
    const files = find("files");
    for (const id of ["add", "drop"]) find(id).addEventListener("click", () => files.click());
    find("remove").addEventListener("click", () => this.removeShown());
    files.addEventListener("change", async () => {
      await this.add([...files.files]);
      files.value = "";
    });
    document.addEventListener("paste", (event) => {
      const pasted = [...(event.clipboardData?.files ?? [])];
      if (pasted.length) {
        event.preventDefault();
        this.add(pasted);
      }
    });
    let depth = 0; // dragenter and dragleave come for every element on the way
    const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
    const mark = (change) => {
      depth = change === 0 ? 0 : depth + change;
      document.body.classList.toggle("over", depth > 0);
    };
    document.addEventListener("dragenter", (event) => holdsFiles(event) && mark(1));
    document.addEventListener("dragleave", (event) => holdsFiles(event) && mark(-1));
    document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      mark(0);
      this.add([...event.dataTransfer.files]);
    });
  }
}

/** A data URL of an image, as the API takes it. */
export function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} can no longer be read: was it moved or changed?`));
    reader.readAsDataURL(file);
  });
}
