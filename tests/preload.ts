// Runs before every test module. A native library stays loaded for the process, which the resource
// sanitizer would count as a leak of the first test that opens a device: open the libraries here.
import { probeBackends } from "../src/device/mod.ts";

probeBackends();
