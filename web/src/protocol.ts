// What the page and the engine's worker say to each other. The engine (src/web/) makes every value below; the page only
// draws them. Seconds, bytes and counts throughout; layers are counted in halves of blocks as the engine cuts them.

/** Everything a run depends on; the page keeps it in the fragment of its address. */
export interface Settings {
  task: string; // a name of Catalog.tasks
  text: string; // pasted text for the task "text"; empty for the repository's own
  size: string; // a name of Catalog.sizes
  devices: number; // 1 to 4
  replicas: number; // pipelines beside each other; divides `devices`
  schedule: string; // a name of Catalog.schedules
  microbatches: number; // one of Catalog.microbatches
  cuts: number[]; // first layer of each stage but the first, such as [1, 2.5]; empty: the planner's
  slow: number[]; // of each device, how many times as long it takes: 1 to 5
  reference: boolean; // also train on one device and compare
  seed: number; // 0 to 4294967295
}

export interface Choice {
  name: string;
  title: string; // for a label
  about: string; // one sentence
}

/** What there is to choose from. */
export interface Catalog {
  version: string;
  tasks: Choice[];
  sizes: Choice[];
  schedules: Choice[];
  microbatches: number[];
  defaults: Settings;
}

export type Kind = "forward" | "backward" | "backward, input" | "backward, weights" | "optimizer" | "copy" | "host";

/** Something that a device did, or is predicted to do. */
export interface Span {
  rank: number; // which lane
  track: "compute" | "copy" | "host";
  kind: Kind;
  label: string; // such as 0F3: stage 0, forward, microbatch 3
  stage: number; // -1: none
  microbatch: number; // -1: none
  start: number; // seconds from the start of the step
  end: number;
  bytes: number;
}

/** A time in which a device has nothing to do. */
export interface Gap {
  rank: number;
  cause: "warm-up" | "drain" | "imbalance" | "link" | "host";
  peer: number; // the device that it waits for; -1: none
  start: number;
  end: number;
}

/** A step, measured or simulated. */
export interface Step {
  seconds: number; // of the whole step
  spans: Span[];
  gaps: Gap[];
  bubble: number; // part of all devices' time with nothing to do, 0 to 1
  busy: number[]; // of each device, the part of the step in which it computes, 0 to 1
}

export interface Device {
  index: number; // which one of Settings.slow is its own, where the planner has put devices into another order
  name: string; // of the adapter
  adapter: string; // what tells one physical GPU from another
  bytes: number; // that the plan allocates on it
  stages: number[]; // which stages it has
  layers: string; // in words, such as "0-1a"
  slow: number;
}

export interface Layer {
  name: string; // such as "embedding", "0a" (attention), "0m" (MLP), "head"
  kind: "embedding" | "attention" | "mlp" | "head";
  start: number; // where a cut before it is, in blocks: 0, 0.5, 1, ...
  parameters: number;
}

/** A run that has been opened. */
export interface Run {
  settings: Settings; // with what was left open filled in (cuts)
  adapters: number; // physical GPUs among the devices
  devices: Device[]; // by rank
  layers: Layer[];
  stages: { first: number; end: number }[]; // indices into layers
  schedule: string; // the grid in the engine's notation, a line a device
  parameters: number;
  predicted: Step; // simulated with what is known of the devices so far
  tokens: number; // of a step
  step: number; // steps done: not 0 when it goes on from a snapshot
}

/** After each step. */
export interface Stepped {
  step: number;
  loss: number; // nats a token
  norm: number; // of the gradient
  seconds: number;
  tokens_per_second: number;
  measured: Step;
  predicted: Step; // of the same plan, with what the steps so far taught
  reference: number | null; // loss of the run on one device at this step
  digits: number | null; // to how many decimal digits the two agree; 17: bit for bit
}

/** What the model can do, now and then. */
export interface Shown {
  step: number;
  text: string; // what it writes, for the task "text"; else empty
  examples: { question: string; answer: string; right: string }[]; // of held-out ones
  accuracy: number | null; // part of all held-out ones asked that were right
  asked: number;
}

/** What the planner would do with the devices as they have been measured. */
export interface Advice {
  words: string[]; // one sentence a line
  settings: Settings; // to take over
  predicted: Step;
  gain: number; // how many times as fast as the plan in force is predicted to be
}

export interface Failure {
  kind: "no-webgpu" | "lost" | "memory" | "input" | "failed";
  message: string; // one line
  device: number; // -1: none in particular
}

/** How the check of the kernels went. */
export interface Verified {
  kernels: number;
  cases: number; // of these kernels, each with one kind of input
  failures: string[];
  stopped: boolean; // early, because something else was asked for
}

/** To the worker. Each is answered by one of Answer with the same id. */
export type Request =
  | { id: number; ask: "catalog" }
  | { id: number; ask: "open"; settings: Settings; keep: boolean } // keep: go on with the weights and step of the run before
  | { id: number; ask: "step" } // one step
  | { id: number; ask: "run" } // step after step until "pause"
  | { id: number; ask: "pause" }
  | { id: number; ask: "slow"; slow: number[] }
  | { id: number; ask: "show" }
  | { id: number; ask: "advise" }
  | { id: number; ask: "lose"; device: number } // gives a device up, as a driver that crashes would
  | { id: number; ask: "trace" } // of the last step, for Perfetto
  | { id: number; ask: "model" } // a Hugging Face folder as a zip file
  | { id: number; ask: "verify" } // every kernel against the reference in f64
  | { id: number; ask: "stop" }; // the check of the kernels, early

export type Answer =
  | { id: number; catalog: Catalog }
  | { id: number; run: Run }
  | { id: number; stepped: Stepped }
  | { id: number; shown: Shown }
  | { id: number; advice: Advice }
  | { id: number; trace: string }
  | { id: number; model: Uint8Array }
  | { id: number; verified: Verified }
  | { id: number; done: true }
  | { id: number; failure: Failure };

/** Unasked: what a running worker says. */
export type Event =
  | { event: "stepped"; stepped: Stepped }
  | { event: "shown"; shown: Shown }
  | { event: "paused" }
  | { event: "checked"; done: number; all: number } // kinds of input, of the check of the kernels
  | { event: "failure"; failure: Failure };
