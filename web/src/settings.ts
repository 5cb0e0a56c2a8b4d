// The settings in the fragment of the address: read with suspicion, written in full.
import type { Catalog, Choice, Settings } from "./protocol";

export const MOST_DEVICES = 4;
export const MOST_SLOW = 5;
/** Longer texts are trained on, but not put into a link. */
export const MOST_LINKED_TEXT = 4000;
const MOST_SEED = 4294967295;

/** What a fragment says, and in sentences what was wrong with it. */
export function read(fragment: string, catalog: Catalog): { settings: Settings; problems: string[] } {
  const settings: Settings = structuredClone(catalog.defaults);
  const problems: string[] = [];
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  const say = (key: string, instead: string) =>
    problems.push(`“${key}” in the address is not understood; it is ${instead}.`);

  const choose = (key: "task" | "size" | "schedule", choices: Choice[]) => {
    const value = given.get(key);
    if (value === null) return;
    if (choices.some((choice) => choice.name === value)) settings[key] = value;
    else say(key, settings[key]);
  };
  choose("task", catalog.tasks);
  choose("size", catalog.sizes);
  choose("schedule", catalog.schedules);

  const integer = (key: "devices" | "replicas" | "microbatches" | "seed", right: (n: number) => boolean) => {
    const value = given.get(key);
    if (value === null) return;
    if (/^\d{1,10}$/.test(value) && right(Number(value))) settings[key] = Number(value);
    else say(key, String(settings[key]));
  };
  integer("devices", (n) => n >= 1 && n <= MOST_DEVICES);
  integer("replicas", (n) => n >= 1 && settings.devices % n === 0);
  if (settings.devices % settings.replicas !== 0) settings.replicas = 1;
  integer("microbatches", (n) => catalog.microbatches.includes(n));
  integer("seed", (n) => n <= MOST_SEED);

  const numbers = (key: "cuts" | "slow", right: (all: number[]) => boolean) => {
    const value = given.get(key);
    if (value === null || value === "") return;
    const all = value.split(",").map((part) => (/^\d{1,4}(\.\d{1,3})?$/.test(part) ? Number(part) : NaN));
    if (!all.some(Number.isNaN) && right(all)) settings[key] = all;
    else say(key, key === "cuts" ? "left to the planner" : "1 for every device");
  };
  settings.slow = evenly(settings.devices, settings.slow);
  numbers("cuts", (all) => all.length < 64 && all.every((cut, i) => i === 0 || all[i - 1] < cut));
  numbers(
    "slow",
    (all) => all.length === settings.devices && all.every((factor) => factor >= 1 && factor <= MOST_SLOW),
  );

  const reference = given.get("reference");
  if (reference === "0" || reference === "1") settings.reference = reference === "1";
  else if (reference !== null) say("reference", settings.reference ? "on" : "off");

  settings.text = (given.get("text") ?? settings.text).slice(0, MOST_LINKED_TEXT);
  return { settings, problems };
}

export function write(settings: Settings): string {
  const { task, size, devices, replicas, schedule, microbatches, cuts, slow, reference, seed, text } = settings;
  const given = new URLSearchParams({
    task,
    size,
    devices: String(devices),
    replicas: String(replicas),
    schedule,
    microbatches: String(microbatches),
    seed: String(seed),
    reference: reference ? "1" : "0",
  });
  if (cuts.length > 0) given.set("cuts", cuts.join(","));
  if (slow.some((factor) => factor !== 1)) given.set("slow", slow.join(","));
  if (task === "text" && text !== "" && text.length <= MOST_LINKED_TEXT) given.set("text", text);
  return `#${given.toString().replaceAll("%2C", ",")}`;
}

/** A factor for each of so many devices, from those there are. */
export function evenly(devices: number, slow: number[]): number[] {
  return Array.from({ length: devices }, (_, rank) => slow[rank] ?? 1);
}

/** How many pipelines so many devices can form beside each other. */
export function replicaChoices(devices: number): number[] {
  return Array.from({ length: devices }, (_, i) => i + 1).filter((replicas) => devices % replicas === 0);
}

/** The settings with some of them changed, and what depends on them made to fit. */
export function changed(settings: Settings, change: Partial<Settings>): Settings {
  const next = { ...settings, ...change };
  next.slow = evenly(next.devices, next.slow);
  if (next.devices % next.replicas !== 0) next.replicas = 1;
  const kept: (keyof Settings)[] = ["size", "task", "devices", "replicas", "schedule"];
  // Cuts belong to the stages that they were made for.
  if (change.cuts === undefined && kept.some((key) => next[key] !== settings[key])) next.cuts = [];
  return next;
}

/** Whether a run can go on with its weights when these change: the model and what it learns stay the same. */
export function keepsWeights(from: Settings, to: Settings): boolean {
  return from.task === to.task && from.text === to.text && from.size === to.size && from.seed === to.seed;
}
