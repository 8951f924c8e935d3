/** Device memory of a training step, to the byte: it is proportional to objects, and plans are all that grows faster than nodes. */
import { assertEquals, assertLess } from "@std/assert";
import { measureStep } from "../bench/graph_memory.ts";
import { Device } from "../src/device/mod.ts";
import { backends } from "./backends.ts";

/** Bytes of a step for each entry of a plan: plan, transposed plan, the gradients of both, and four indices. */
const OF_ENTRY = 8 * 4;

for (const backend of backends()) {
  for (const fusion of ["late", "amosl"] as const) {
    Deno.test(`graph memory: ${backend}: of ${fusion}, proportional to objects, and to nodes but for plans`, () => {
      using device = Device.open({ backend });
      // Multiples of 16, so that tensors, which begin at multiples of 64 bytes, leave no gaps.
      const bytes = (objects: number, nodes: number) => {
        const { tensors, beside } = measureStep(device, { fusion, objects, nodes, width: 16 });
        return tensors + beside;
      };
      const differences = (values: number[]) =>
        values.slice(1).map((value, i) => value - values[i]!);
      const byObjects = [16, 32, 48, 64].map((objects) => bytes(objects, 16));
      const [step, ...others] = differences(byObjects);
      assertEquals(others, [step, step]);
      // Nothing but what is there once: constants, and the ends of offsets.
      assertLess(byObjects[0]! - step!, 4096);
      const byNodes = [16, 32, 48, 64].map((nodes) => bytes(16, nodes));
      const ofEntries = fusion === "late" ? 0 : OF_ENTRY;
      // Of 16 objects with n^2 entries each, n growing by 16.
      const second = 16 * 2 * 16 ** 2 * ofEntries;
      assertEquals(differences(differences(byNodes)), [second, second]);
    });
  }
}
