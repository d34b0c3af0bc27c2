// The search runs in a worker, and browsers start none for a page that was opened from a disk: there its script runs
// in a hidden frame instead. Messages arrive later, as those of a worker do, and never inside the call that sends them.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((done) => this.frame.addEventListener("load", done, { once: true })).then(() => {
        const inside = this.frame.contentWindow;
        inside.postMessage = (data) =>
          setTimeout(() => {
            const event = new MessageEvent("message", { data });
            this.dispatchEvent(event);
            this.onmessage?.(event);
          });
        return new Promise((done, failed) => {
          const script = inside.document.createElement("script");
          script.src = new URL(url, location.href).href;
          script.addEventListener("load", done);
          script.addEventListener("error", failed);
          inside.document.body.append(script);
        });
      });
      this.ready.catch((error) => this.onerror?.(error));
      document.body.append(this.frame);
    }

    postMessage(data) {
      const copy = structuredClone(data);
      this.ready.then(() =>
        setTimeout(() => this.frame.contentWindow?.dispatchEvent(new MessageEvent("message", { data: copy }))),
      );
    }

    terminate() {
      this.frame.remove();
    }
  };
}
