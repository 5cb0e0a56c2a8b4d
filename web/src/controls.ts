// The form with the settings.
import { make, need, say } from "./dom";
import type { Catalog, Choice, Settings } from "./protocol";
import { MOST_DEVICES, replicaChoices } from "./settings";
import { count } from "./words";

type Change = (change: Partial<Settings>) => void;

export class Controls {
  private readonly form = need<HTMLFormElement>("controls");
  private readonly selects = new Map<string, { select: HTMLSelectElement; about: HTMLElement; choices: Choice[] }>();
  private readonly devices: HTMLInputElement[] = [];
  private readonly replicas = make("select", { id: "replicas" });
  private readonly seed = make("input", {
    id: "seed",
    type: "number",
    min: 0,
    max: 4294967295,
    step: 1,
    inputmode: "numeric",
  });
  private readonly reference = make("input", { id: "reference", type: "checkbox" });
  private readonly text = make("textarea", {
    id: "text",
    rows: 5,
    spellcheck: "false",
    placeholder: "Paste at least a few thousand letters, or leave it empty: then it is this project's documentation.",
  });
  private readonly textField: HTMLElement;
  private readonly replicaField: HTMLElement;

  constructor(
    private readonly catalog: Catalog,
    change: Change,
  ) {
    this.form.onsubmit = (event) => event.preventDefault();
    const choice = (key: "task" | "size" | "schedule", title: string, choices: Choice[]) =>
      this.select(key, title, choices, (name) => change({ [key]: name }));
    const microbatches = catalog.microbatches.map((n) => ({
      name: String(n),
      title: String(n),
      about:
        n === 1 ? "The whole batch at once: nothing overlaps." : `The batch in ${n} pieces that follow each other.`,
    }));
    this.textField = make("div", { class: "field wide" }, make("label", { for: "text" }, "Text to learn"), this.text);
    this.replicaField = this.field(
      "replicas",
      "Pipelines",
      this.replicas,
      "Copies of the pipeline beside each other share the work.",
    );
    this.form.replaceChildren(
      make(
        "p",
        { class: "field wide hint" },
        "Another task, model, seed or text begins a new training. Everything else goes on with the same weights.",
      ),
      choice("task", "Task", catalog.tasks),
      choice("size", "Model", catalog.sizes),
      this.deviceField(change),
      choice("schedule", "Schedule", catalog.schedules),
      this.select("microbatches", "Microbatches", microbatches, (n) => change({ microbatches: Number(n) })),
      this.replicaField,
      this.field("seed", "Seed", this.seed, "The same seed gives the same training, number for number."),
      make(
        "div",
        { class: "field" },
        make("span", { class: "label" }, "Comparison"),
        make("label", { class: "tick" }, this.reference, "train on one device too"),
        make("small", {}, "It takes time of its own, between the steps."),
      ),
      this.textField,
    );
    this.replicas.onchange = () => change({ replicas: Number(this.replicas.value) });
    this.reference.onchange = () => change({ reference: this.reference.checked });
    this.text.onchange = () => change({ text: this.text.value });
    this.seed.onchange = () => {
      const seed = Math.round(Number(this.seed.value));
      if (this.seed.value !== "" && seed >= 0 && seed <= 4294967295) change({ seed });
      else this.seed.value = this.seed.defaultValue;
    };
  }

  private field(id: string, title: string, control: HTMLElement, about: string): HTMLElement {
    return make("div", { class: "field" }, make("label", { for: id }, title), control, make("small", {}, about));
  }

  private select(id: string, title: string, choices: Choice[], changed: (name: string) => void): HTMLElement {
    const select = make(
      "select",
      { id },
      ...choices.map((choice) => make("option", { value: choice.name }, choice.title)),
    );
    select.onchange = () => changed(select.value);
    const about = make("small");
    this.selects.set(id, { select, about, choices });
    return make("div", { class: "field" }, make("label", { for: id }, title), select, about);
  }

  private deviceField(change: Change): HTMLElement {
    const row = make("div", { class: "segments" });
    for (let n = 1; n <= MOST_DEVICES; n++) {
      const input = make("input", { type: "radio", name: "devices", value: n, id: `devices-${n}` });
      input.onchange = () => change({ devices: n });
      this.devices.push(input);
      row.append(input, make("label", { for: `devices-${n}` }, String(n)));
    }
    return make(
      "fieldset",
      { class: "field" },
      make("legend", {}, "Devices"),
      row,
      make("small", {}, "Each gets a part of the model."),
    );
  }

  /** Shows the settings in force. */
  show(settings: Settings): void {
    const choose = (id: string, name: string) => {
      const entry = this.selects.get(id)!;
      entry.select.value = name;
      say(entry.about, entry.choices.find((choice) => choice.name === name)?.about ?? "");
    };
    choose("task", settings.task);
    choose("size", settings.size);
    choose("schedule", settings.schedule);
    choose("microbatches", String(settings.microbatches));
    this.devices.forEach((input, i) => (input.checked = i + 1 === settings.devices));
    const replicas = replicaChoices(settings.devices);
    this.replicas.replaceChildren(
      ...replicas.map((n) =>
        make("option", { value: n }, n === 1 ? "1" : `${n}, each of ${count(settings.devices / n, "device")}`),
      ),
    );
    this.replicas.value = String(settings.replicas);
    this.replicas.disabled = replicas.length < 2;
    this.seed.value = this.seed.defaultValue = String(settings.seed);
    this.reference.checked = settings.reference;
    this.textField.hidden = settings.task !== "text";
    if (document.activeElement !== this.text) this.text.value = settings.text;
    say(need("settings-words"), this.summary(settings));
  }

  private summary(settings: Settings): string {
    const title = (choices: Choice[], name: string) => choices.find((choice) => choice.name === name)?.title ?? name;
    const { catalog } = this;
    return [
      title(catalog.tasks, settings.task),
      title(catalog.sizes, settings.size),
      count(settings.devices, "device"),
      title(catalog.schedules, settings.schedule),
      count(settings.microbatches, "microbatch", "microbatches"),
      `seed ${settings.seed}`,
    ].join(" · ");
  }
}
