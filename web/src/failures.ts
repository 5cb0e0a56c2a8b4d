// What can go wrong, and what to say of it.
import type { Failure } from "./protocol";
import { device } from "./words";

export class EngineFailure extends Error {
  constructor(readonly failure: Failure) {
    super(failure.message);
  }
}

const KINDS: readonly Failure["kind"][] = ["no-webgpu", "lost", "memory", "input", "failed"];

/** Of whatever was thrown. The engine's own errors are a Failure as JSON; others are taken by their message. */
export function failureOf(thrown: unknown): Failure {
  if (thrown instanceof EngineFailure) return thrown.failure;
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  try {
    const { kind, message: said, device: rank } = JSON.parse(message.replace(/^Uncaught (Error: )?/, ""));
    if (KINDS.includes(kind) && typeof said === "string") {
      return { kind, message: said, device: Number.isInteger(rank) ? rank : -1 };
    }
  } catch {
    // Not the engine's.
  }
  return { kind: "failed", message: message.split("\n", 1)[0], device: -1 };
}

/** The headline for a failure; its own message comes after it. */
export function headline(failure: Failure): string {
  switch (failure.kind) {
    case "no-webgpu":
      return "This browser does not offer WebGPU to this page.";
    case "lost":
      return failure.device < 0 ? "A device is gone." : `${device(failure.device)} is gone.`;
    case "memory":
      return "That does not fit into memory.";
    case "input":
      return "That does not work as it is set.";
    case "failed":
      return "Something failed.";
  }
}

/** What helps where WebGPU is missing: this browser first, then the others. */
export function withoutWebGpu(agent: string, secure: boolean): { title: string; steps: string }[] {
  const chromium = {
    title: "Chrome and Edge on Windows, macOS, ChromeOS and Android",
    steps:
      "WebGPU is on from version 121. Update the browser, then look in Settings, System: “Use graphics acceleration when available” must be on. The page chrome://gpu says what is missing.",
  };
  const linux = {
    title: "Chrome and Chromium on Linux",
    steps:
      "Open chrome://flags/#enable-unsafe-webgpu, choose “Enabled” and restart the browser. Without a graphics card of your own, start it with --enable-unsafe-webgpu --use-webgpu-adapter=swiftshader.",
  };
  const firefox = {
    title: "Firefox",
    steps:
      "WebGPU is on from version 141 on Windows and 145 on Macs with Apple's chips. Elsewhere open about:config and set dom.webgpu.enabled and dom.webgpu.workers.enabled to true.",
  };
  const safari = {
    title: "Safari",
    steps:
      "WebGPU is on from version 26. Before that: Settings, Advanced, “Show features for web developers”, then Feature Flags, WebGPU; on an iPhone Settings, Apps, Safari, Advanced, Feature Flags.",
  };
  const all = [chromium, linux, firefox, safari];
  const own = /Firefox\//.test(agent)
    ? firefox
    : /Chrome\/|Chromium\//.test(agent)
      ? /Linux/.test(agent) && !/Android/.test(agent)
        ? linux
        : chromium
      : /Safari\//.test(agent)
        ? safari
        : null;
  const ordered = own === null ? all : [own, ...all.filter((other) => other !== own)];
  if (secure) return ordered;
  const plain = {
    title: "The address of this page",
    steps: "Browsers offer WebGPU only to pages from https:// or from localhost. Open it at such an address.",
  };
  return [plain, ...ordered];
}
