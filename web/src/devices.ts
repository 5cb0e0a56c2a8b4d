// A card for each device: what it holds, how busy it is, a slider that makes it slower, a button that gives it up.
import { make, need, say } from "./dom";
import { bytes, percent } from "./format";
import type { Run, Stepped } from "./protocol";
import { MOST_DEVICES, MOST_SLOW } from "./settings";
import { device, layersInWords, list } from "./words";

interface Card {
  busy: HTMLElement;
  bar: HTMLElement;
}

export interface DeviceActions {
  slow(index: number, factor: number): void;
  lose(rank: number): void;
  add(): void;
}

export class Devices {
  private cards: Card[] = [];

  constructor(private readonly actions: DeviceActions) {}

  open(run: Run): void {
    const focused = document.activeElement?.id;
    const most = Math.max(1, ...run.devices.map((one) => one.bytes));
    this.cards = [];
    const elements: HTMLElement[] = run.devices.map((one, rank) => {
      const layers = list(
        one.stages.map((stage) => layersInWords(run, run.stages[stage].first, run.stages[stage].end)),
      );
      const busy = make("b", {}, "–");
      const bar = make("i", {});
      const factor = make("output", { for: `slow-${rank}` }, slowness(one.slow));
      const slow = make("input", {
        type: "range",
        id: `slow-${rank}`,
        min: 1,
        max: MOST_SLOW,
        step: 0.5,
        value: one.slow,
        "aria-valuetext": slowness(one.slow),
      });
      slow.oninput = () => {
        say(factor, slowness(Number(slow.value)));
        slow.setAttribute("aria-valuetext", slowness(Number(slow.value)));
      };
      slow.onchange = () => this.actions.slow(one.index, Number(slow.value));
      const lose = make(
        "button",
        {
          type: "button",
          class: "plain",
          id: `lose-${rank}`,
          disabled: run.devices.length < 2,
          title: run.devices.length < 2 ? "It is the only one." : "Give this device up, as when its cable is pulled",
        },
        "Unplug",
      );
      lose.onclick = () => this.actions.lose(rank);
      this.cards.push({ busy, bar });
      const held = make("i", {});
      held.style.width = `${(one.bytes / most) * 100}%`;
      return make(
        "article",
        { class: "device", "data-test": `device-${rank}` },
        make("header", {}, make("h3", {}, device(rank)), lose),
        make("p", { class: "adapter", title: one.name }, one.name),
        make("p", { class: "holds" }, layers),
        make(
          "div",
          { class: "meter" },
          make("span", {}, "memory"),
          make("b", {}, bytes(one.bytes)),
          make("span", { class: "track", "aria-hidden": "true" }, held),
        ),
        make(
          "div",
          { class: "meter" },
          make("span", {}, "busy"),
          busy,
          make("span", { class: "track", "aria-hidden": "true" }, bar),
        ),
        make("label", { class: "slower", for: `slow-${rank}` }, make("span", {}, "make it slower"), factor),
        slow,
      );
    });
    if (run.devices.length < MOST_DEVICES) {
      const add = make(
        "button",
        { type: "button", id: "add-device", class: "device add" },
        make("span", { "aria-hidden": "true" }, "+"),
        "Add a device",
      );
      add.onclick = () => this.actions.add();
      elements.push(add);
    }
    need("devices").replaceChildren(...elements);
    if (focused && /^(slow|lose)-\d$|^add-device$/.test(focused))
      document.getElementById(focused)?.focus({ preventScroll: true });
  }

  update({ measured }: Stepped): void {
    this.cards.forEach((card, rank) => {
      const busy = measured.busy[rank] ?? 0;
      say(card.busy, percent(busy));
      card.bar.style.width = `${Math.min(1, busy) * 100}%`;
    });
  }
}

const slowness = (factor: number) => (factor === 1 ? "full speed" : `${factor}× as long`);
