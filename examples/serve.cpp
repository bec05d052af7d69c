// Runs a packaged model without Python: `serve model.pt2 [images.f32]`.
//
// The images are raw 32-bit floats (B, C, H, W), normalised as the model's metadata says; without a file they are
// noise. Prints the highest output of each image and the time of a call. For models that take images alone.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>

using Metadata = std::unordered_map<std::string, std::string>;

const std::map<std::string, at::ScalarType> kTypes = {
    {"float64", at::kDouble}, {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};

// The numbers that idlefx has written under this name, such as "3 224 224".
std::vector<int64_t> numbers(const Metadata& metadata, const std::string& name) {
  std::istringstream text(metadata.at("idlefx_" + name));
  return {std::istream_iterator<int64_t>(text), {}};
}

at::Tensor read_images(const char* path, std::vector<int64_t> shape) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  int64_t image = sizeof(float);
  for (auto size : shape) image *= size;
  if (bytes.empty() || bytes.size() % image)
    throw std::runtime_error(std::string(path) + " does not hold whole images of " + std::to_string(image) + " bytes");
  shape.insert(shape.begin(), bytes.size() / image);
  return at::from_blob(const_cast<char*>(bytes.data()), shape, at::kFloat).clone();
}

int run(int count, char** arguments) {
  if (count < 2) throw std::runtime_error("usage: serve model.pt2 [images.f32]");
  c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
  const auto metadata = loader.get_metadata();
  if (!metadata.count("idlefx")) throw std::runtime_error("the file was not made by idlefx.package");

  auto shape = numbers(metadata, "image_size");
  const auto batch = numbers(metadata, "batch");
  at::Tensor images;
  if (count > 2) {
    images = read_images(arguments[2], shape);
  } else {
    shape.insert(shape.begin(), batch[0]);
    images = at::randn(shape);
  }
  if (images.size(0) < batch[0] || images.size(0) > batch[1])  // the compiled code does not look
    throw std::runtime_error(
        std::to_string(images.size(0)) + " images, the model takes " + metadata.at("idlefx_batch"));
  images = images.to(at::Device(metadata.at("idlefx_device")), kTypes.at(metadata.at("idlefx_dtype"))).contiguous();

  loader.run({images});  // warm
  const auto start = std::chrono::steady_clock::now();
  const auto output = loader.run({images})[0].to(at::kCPU, at::kFloat).flatten(1);
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;

  const auto [score, place] = output.max(1);
  for (int64_t image = 0; image < output.size(0); ++image)
    std::cout << "image " << image << ": " << place[image].item<int64_t>() << " (" << score[image].item<float>() << ")\n";
  std::cout << taken.count() << " ms for " << output.size(0) << " images\n";
  return 0;
}

int main(int count, char** arguments) {
  try {
    return run(count, arguments);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 2;
  }
}
