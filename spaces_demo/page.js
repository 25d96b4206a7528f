// The page's own behaviour: jumping to a moment, playing both videos together, drawing a box on a frame.
const sparrow = {
  players() {
    return ["overlay", "original"].map((id) => document.querySelector(`#${id} video`)).filter(Boolean);
  },

  // The players stop at the frame that lies on the stage.
  seekToStage() {
    const stage = document.querySelector(".sp-stage");
    if (!stage) return;
    for (const player of sparrow.players()) {
      player.pause();
      player.currentTime = Number(stage.dataset.time);
    }
  },

  // What one player does, the other does too. Events come late: one that no longer says what its player does is left
  // alone, or two players that were told different things would answer each other for ever.
  mirror({ type, target }) {
    const players = sparrow.players();
    const other = players.find((player) => player !== target);
    if (!players.includes(target) || !other) return;
    const apart = Math.abs(other.currentTime - target.currentTime) > 0.05;
    if (type === "seeked" && !target.seeking && apart) other.currentTime = target.currentTime;
    if (type === "play" && !target.paused && other.paused) other.play().catch(() => {});
    if (type === "pause" && target.paused && !other.paused) other.pause();
  },

  // Phrases, segments of the timeline, and the chart lead to a frame.
  jumps(element, jump) {
    element.addEventListener("click", (event) => {
      const target = event.target.closest("[data-frame], svg[data-frames]");
      if (!target) return;
      const area = target.getBoundingClientRect();
      const share = event.detail ? (event.clientX - area.left) / area.width : 0; // by keyboard: its beginning
      const start = Number(target.dataset.frame || 0);
      const stop = Number(target.dataset.frames || target.dataset.stop || start + 1);
      jump(Math.min(stop - 1, Math.floor(start + share * (stop - start))));
    });
  },

  toggles(element, toggle) {
    element.addEventListener("click", (event) => {
      const target = event.target.closest("[role=switch]");
      if (!target) return;
      const shown = target.getAttribute("aria-checked") !== "true";
      target.setAttribute("aria-checked", shown);
      toggle(Number(target.dataset.object), shown);
    });
  },

  // A box in pixels of the video, drawn with the pointer or moved with the arrow keys.
  stage(element, correct) {
    let corner = null;
    const rect = () => element.querySelector(".sp-box");
    const chosen = () => element.querySelector(".sp-object")?.selectedOptions[0];
    const numbers = () => ["x", "y", "width", "height"].map((name) => Number(rect().getAttribute(name)));
    const place = (x0, y0, x1, y1) => {
      const frame = element.querySelector("svg").viewBox.baseVal;
      [x0, x1] = [x0, x1].map((x) => Math.min(Math.max(x, 0), frame.width));
      [y0, y1] = [y0, y1].map((y) => Math.min(Math.max(y, 0), frame.height));
      const values = { x: Math.min(x0, x1), y: Math.min(y0, y1), width: Math.abs(x1 - x0), height: Math.abs(y1 - y0) };
      for (const [name, value] of Object.entries(values)) rect().setAttribute(name, value);
      rect().style.cssText = chosen()?.style.cssText ?? "";
    };
    const pointer = (event) => {
      const svg = element.querySelector("svg");
      return new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    };
    element.addEventListener("pointerdown", (event) => {
      if (!event.target.closest("svg") || !chosen()) return;
      event.preventDefault();
      event.target.closest("svg").focus();
      event.target.closest("svg").setPointerCapture(event.pointerId);
      corner = pointer(event);
      place(corner.x, corner.y, corner.x, corner.y);
    });
    element.addEventListener("pointermove", (event) => {
      if (corner) place(corner.x, corner.y, pointer(event).x, pointer(event).y);
    });
    element.addEventListener("pointerup", () => (corner = null));
    element.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: [-4, 0], ArrowRight: [4, 0], ArrowUp: [0, -4], ArrowDown: [0, 4] };
      if (!event.target.closest("svg") || !steps[event.key] || !chosen()) return;
      event.preventDefault();
      let [x, y, width, height] = numbers();
      if (!width) [x, y, width, height] = sparrow.ownBox(chosen(), element.querySelector("svg").viewBox.baseVal);
      const [dx, dy] = steps[event.key];
      if (event.shiftKey) place(x, y, x + Math.max(width + dx, 4), y + Math.max(height + dy, 4));
      else place(x + dx, y + dy, x + dx + width, y + dy + height);
    });
    element.addEventListener("change", (event) => {
      if (event.target.matches(".sp-object")) place(0, 0, 0, 0);
    });
    element.addEventListener("click", (event) => {
      if (!event.target.matches(".sp-apply")) return;
      const [x, y, width, height] = numbers();
      const frame = Number(element.querySelector(".sp-stage").dataset.frame);
      const whole = element.querySelector(".sp-whole").checked;
      correct({ object: Number(chosen().value), frame, whole, box: [x, y, x + width, y + height] });
    });
  },

  // Where the object is on this frame, else the middle of it: x, y, width, height.
  ownBox(option, frame) {
    if (!option.dataset.box) return [frame.width / 3, frame.height / 3, frame.width / 3, frame.height / 3];
    const [x0, y0, x1, y1] = option.dataset.box.split(",").map(Number);
    return [x0, y0, x1 - x0, y1 - y0];
  },
};

for (const type of ["play", "pause", "seeked"]) document.addEventListener(type, sparrow.mirror, true);
