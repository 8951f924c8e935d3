import { Device } from "../src/device/mod.ts";
import { PackhorseError } from "../src/error.ts";

/** The backend that PACKHORSE_BACKEND names, or without it those that open on this machine. */
export function backends(): ("cpu" | "cuda")[] {
  const named = Deno.env.get("PACKHORSE_BACKEND") ?? "auto";
  if (named === "cpu" || named === "cuda") return [named];
  return (["cpu", "cuda"] as const).filter((backend) => {
    try {
      using _device = Device.open({ backend });
      return true;
    } catch (error) {
      // A machine may have no GPU, or no CUDA library built; the CPU's must open.
      if (backend === "cuda" && error instanceof PackhorseError) return false;
      throw error;
    }
  });
}
