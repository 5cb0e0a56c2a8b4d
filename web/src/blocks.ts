// The model as a row of layers, grouped by the device that has them. Between two groups is a handle that moves the cut.
import { make, need, say } from "./dom";
import { about } from "./format";
import type { Layer, Run } from "./protocol";
import { blockNumbers, deviceNumber, FIRST, inside, layersInWords, list } from "./words";

/** After the last key press a cut stays where it is for this long before the run is opened again. */
const SETTLE = 500;

export class Blocks {
  private readonly place = need("blocks");
  private run: Run | null = null;
  private bounds: number[] = []; // where each stage begins, then the end
  private layers: HTMLElement[] = [];
  private stages: HTMLElement[] = [];
  private handles: (HTMLElement | null)[] = [];
  private settling = 0;

  constructor(private readonly moved: (cuts: number[]) => void) {}

  open(run: Run): void {
    clearTimeout(this.settling);
    const focused = this.handles.findIndex((handle) => handle !== null && handle === document.activeElement);
    this.run = run;
    this.bounds = [...run.stages.map((stage) => stage.first), run.layers.length];
    const blocks = blockNumbers(run);
    this.layers = run.layers.map((layer, i) => this.layer(layer, blocks[i]));
    this.stages = run.stages.map((_, stage) => this.stage(run, stage));
    this.handles = run.stages.slice(1).map((_, i) => this.handle(run, i + 1));
    this.place.replaceChildren(
      ...this.stages.flatMap((stage, i) =>
        i === 0 ? [stage] : [this.handles[i - 1] ?? make("span", { class: "seam" }), stage],
      ),
    );
    this.put();
    say(
      need("cut-words"),
      this.handles.some(Boolean)
        ? "Drag a handle, or use the arrow keys on it: the run goes on with the same weights, only cut elsewhere."
        : "With two devices or more there is a handle at every cut.",
    );
    this.handles[focused]?.focus({ preventScroll: true });
  }

  private layer(layer: Layer, block: number): HTMLElement {
    const short = { embedding: "E", attention: `A${block}`, mlp: `M${block}`, head: "H" }[layer.kind];
    const long = { embedding: "embedding", attention: "attention", mlp: "MLP", head: "head" }[layer.kind];
    const title = `${long}${block > 0 ? ` of block ${block}` : ""}: ${about(layer.parameters)} numbers to learn`;
    return make(
      "div",
      { class: `layer ${layer.kind}`, title },
      make("span", { class: "short" }, short),
      make(
        "span",
        { class: "long" },
        make("b", {}, long),
        make("small", {}, block > 0 ? `block ${block}` : layer.kind === "embedding" ? "input" : "output"),
      ),
    );
  }

  private stage(run: Run, stage: number): HTMLElement {
    const ranks = run.devices.flatMap((device, rank) => (device.stages.includes(stage) ? [rank] : []));
    const numbers = ranks.map((rank) => String(deviceNumber(rank)));
    const several = run.stages.length > run.devices.length / Math.max(1, ranks.length);
    const names = [
      make("b", { class: "long" }, `Device ${list(numbers)}`),
      make("b", { class: "short" }, `D${numbers.join(", ")}`),
      ...(several
        ? [
            make("span", { class: "long" }, `stage ${stage + FIRST}`),
            make("span", { class: "short" }, `S${stage + FIRST}`),
          ]
        : []),
    ];
    const layers = make("div", { class: "stage-layers" });
    return make("div", { class: "stage", "data-stage": stage }, make("div", { class: "stage-name" }, ...names), layers);
  }

  private handle(run: Run, at: number): HTMLElement | null {
    const owner = (stage: number) => run.devices.findIndex((device) => device.stages.includes(stage));
    if (owner(at - 1) === owner(at)) return null;
    const handle = make(
      "div",
      {
        class: "cut",
        role: "slider",
        tabindex: 0,
        "data-test": `cut-${at}`,
        "aria-label": `Cut between ${inside(owner(at - 1))} and ${inside(owner(at))}`,
        "aria-orientation": "horizontal",
      },
      make("span", { "aria-hidden": "true" }),
    );
    handle.addEventListener("pointerdown", (event) => this.drag(event, handle, at));
    handle.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      const to =
        event.key === "Home" ? 0 : event.key === "End" ? Infinity : by === undefined ? null : this.bounds[at] + by;
      if (to === null) return;
      event.preventDefault();
      if (!this.move(at, to)) return;
      clearTimeout(this.settling);
      this.settling = setTimeout(() => this.drop(), SETTLE);
    });
    return handle;
  }

  private drag(event: PointerEvent, handle: HTMLElement, at: number): void {
    if (event.button !== 0) return;
    event.preventDefault();
    handle.focus({ preventScroll: true });
    handle.setPointerCapture(event.pointerId);
    handle.classList.add("held");
    const before = this.bounds[at];
    const move = (moved: PointerEvent) => {
      const first = this.layers[0].getBoundingClientRect().left;
      const last = this.layers[this.layers.length - 1].getBoundingClientRect().right;
      this.move(at, Math.round(((moved.clientX - first) / (last - first)) * this.layers.length));
    };
    const end = () => {
      handle.classList.remove("held");
      handle.removeEventListener("pointermove", move);
      handle.removeEventListener("pointerup", end);
      handle.removeEventListener("pointercancel", end);
      if (this.bounds[at] !== before) this.drop();
    };
    handle.addEventListener("pointermove", move);
    handle.addEventListener("pointerup", end);
    handle.addEventListener("pointercancel", end);
  }

  /** Moves a cut as far towards a layer as its neighbours allow; whether it moved at all. */
  private move(at: number, to: number): boolean {
    const bounded = Math.max(this.bounds[at - 1] + 1, Math.min(this.bounds[at + 1] - 1, to));
    if (bounded === this.bounds[at]) return false;
    this.bounds[at] = bounded;
    this.put();
    return true;
  }

  private drop(): void {
    const run = this.run;
    if (run !== null) this.moved(this.bounds.slice(1, -1).map((layer) => run.layers[layer].start));
  }

  /** Puts every layer into its stage. */
  private put(): void {
    const run = this.run;
    if (run === null) return;
    this.stages.forEach((stage, i) => {
      const [first, end] = [this.bounds[i], this.bounds[i + 1]];
      const place = stage.lastElementChild!;
      const layers = this.layers.slice(first, end);
      if (place.childElementCount !== layers.length || place.firstElementChild !== layers[0])
        place.replaceChildren(...layers);
      stage.style.flexGrow = String(layers.length);
    });
    this.handles.forEach((handle, i) => {
      if (handle === null) return;
      const at = i + 1;
      handle.setAttribute("aria-valuemin", String(this.bounds[at - 1] + 1));
      handle.setAttribute("aria-valuemax", String(this.bounds[at + 1] - 1));
      handle.setAttribute("aria-valuenow", String(this.bounds[at]));
      const [left, right] = [
        layersInWords(run, this.bounds[at - 1], this.bounds[at]),
        layersInWords(run, this.bounds[at], this.bounds[at + 1]),
      ];
      handle.setAttribute("aria-valuetext", `before it ${left}; after it ${right}`);
    });
  }
}
