// The explanations, each beside what it explains, with numbers of the run in view and buttons that change it.
import { make, need, say } from "./dom";
import { about, percent } from "./format";
import type { Catalog, Run, Settings, Step } from "./protocol";
import { count } from "./words";

/** What each schedule does about order, memory and empty cells. */
const SCHEDULES: Record<string, string> = {
  gpipe:
    "GPipe does all forward passes first (F), then all backward passes (B). A backward pass needs what its forward pass left behind, so each device keeps the results of every microbatch until the end of the step: memory grows with their number.",
  "1f1b":
    "1F1B means one forward, one backward. GPipe would do all forward passes first and keep the results of every microbatch until its backward pass. Here a device does a backward pass as soon as it can and then forgets that microbatch: it never keeps more of them than there are devices, so it needs less memory.",
  "eager-1f1b":
    "This is 1F1B that starts a few more forward passes early, so that results are already there when the next device wants them. It pays for hidden waiting with a little memory.",
  "interleaved-1f1b":
    "Every device has several smaller stages instead of a large one (the bar under a box marks the later ones). The first microbatch reaches the last device sooner, so there is less waiting, but more is sent.",
  "zb-h1":
    "Zero-bubble splits the backward pass in two: I is what the device before waits for, W is what nobody waits for. I goes first; W is put where the device would have had nothing to do.",
  "zb-h2":
    "Zero-bubble splits the backward pass in two: I is what the device before waits for, W is what nobody waits for. W fills the gaps. H2 also starts more forward passes early, which fills even more of them and takes more memory.",
  "zb-v":
    "Zero-bubble splits the backward pass in two: I is what the device before waits for, W fills the gaps. In the V shape the work runs down the devices and back up, so the first device has the first stage and the last.",
  auto: "This order was made for the times that were measured on these devices: the planner puts every action where it fits best. It may split the backward pass in two: I is what the device before waits for, W is what nobody waits for.",
};

interface Trial {
  words: string;
  change: Partial<Settings>;
}

export class Explanations {
  constructor(
    private readonly catalog: Catalog,
    private readonly change: (change: Partial<Settings>) => void,
  ) {}

  open(run: Run): void {
    const { settings, stages, devices, parameters } = run;
    const pieces = settings.microbatches;
    say(
      need("explain-microbatch"),
      pieces === 1
        ? "A step learns from a batch of examples at once. Now the batch is one piece: while one device works on it, all others can only wait. Cut it into microbatches, and they follow each other like cars on an assembly line."
        : `A step learns from a batch of examples at once. The batch is cut into ${pieces} microbatches, and the number on a box says which one it is. While the second device works on microbatch 1, the first goes on with 2, like cars on an assembly line.`,
    );
    say(need("explain-schedule"), this.schedule(settings.schedule));
    const several = stages.length > devices.length ? ` Each device has several stages.` : "";
    say(
      need("explain-split"),
      devices.length === 1
        ? `The model has ${about(parameters)} numbers to learn, in layers. All of them are on one device now. Add one, and the row is cut.`
        : `The model has ${about(parameters)} numbers to learn, in layers that follow each other. The row is cut into ${count(stages.length, "stage")}: no device holds the whole model.${several} Only what goes over a cut is sent from device to device. Each block is attention, which looks at what came before, and an MLP, which works on each place alone.`,
    );
    this.offer("microbatches", settings, [
      { words: "1 microbatch", change: { microbatches: this.catalog.microbatches[0] } },
      {
        words: `${this.catalog.microbatches[this.catalog.microbatches.length - 1]} microbatches`,
        change: { microbatches: this.catalog.microbatches[this.catalog.microbatches.length - 1] },
      },
    ]);
    const slower = settings.slow.map((factor, rank) => (rank === settings.devices - 1 ? 3 : factor));
    this.offer("bubble", settings, [
      { words: "Make the last device 3 times slower", change: { slow: slower } },
      { words: "All at full speed", change: { slow: settings.slow.map(() => 1) } },
    ]);
    const named = ["gpipe", "1f1b", "zb-h1"].flatMap((name) =>
      this.catalog.schedules.filter((schedule) => schedule.name === name),
    );
    this.offer(
      "schedule",
      settings,
      named.map(({ name, title }) => ({ words: title, change: { schedule: name } })),
    );
    this.bubble(run.predicted, false);
  }

  private schedule(name: string): string {
    return SCHEDULES[name] ?? this.catalog.schedules.find((schedule) => schedule.name === name)?.about ?? "";
  }

  private offer(place: string, settings: Settings, trials: Trial[]): void {
    const buttons = trials.map(({ words, change }) => {
      const inForce = Object.entries(change).every(
        ([key, value]) => String(settings[key as keyof Settings]) === String(value),
      );
      const button = make("button", { type: "button", class: "trial", "aria-pressed": String(inForce) }, words);
      button.onclick = () => this.change(change);
      return button;
    });
    const element = document.querySelector(`.try[data-for="${place}"]`);
    const focused = element === null ? -1 : [...element.children].indexOf(document.activeElement!);
    element?.replaceChildren(...buttons);
    buttons[focused]?.focus({ preventScroll: true });
  }

  bubble(step: Step, measured: boolean): void {
    const words =
      step.busy.length === 1
        ? "One device waits for nobody, so nothing is patterned. With two or more, the later ones have nothing to do until the first microbatch reaches them."
        : `A device cannot begin before the one before it hands on its first result, so the later ones wait at the start. What to change comes back the other way, so the last ones are done first and wait at the end. In between, a device with less to do waits for a slower neighbour. All this waiting is called the bubble: ${percent(step.bubble)} of all devices' time ${measured ? "in this step" : "as simulated"}. More microbatches make it smaller, a slow device makes it larger.`;
    say(need("explain-bubble"), words);
  }
}
