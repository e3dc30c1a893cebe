#include "cubin.h"

#include <elf.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <regex>
#include <stdexcept>

namespace fake {
namespace {

// Of .nv.info, as cuobjdump prints it: a format byte, an attribute byte, then a value or its size
// and the value.
constexpr uint8_t kFORMAT_SIZED = 4;
constexpr uint8_t kREQNTID = 0x10;
constexpr uint8_t kKPARAM_INFO = 0x17;
constexpr uint32_t kPARAMETER_SIZE_SHIFT = 18;

constexpr uint16_t kMACHINE_CUDA = 190;
constexpr unsigned char kABI_BLACKWELL = 8;
constexpr uint32_t kACCELERATED = 0x800;

template <class Value>
Value readAt(unsigned char const* data) {
    Value value;
    std::memcpy(&value, data, sizeof(value));
    return value;
}

ImageKernel readInfo(std::string function, unsigned char const* info, size_t size) {
    std::map<uint16_t, size_t> sizes;
    uint32_t threads = 0;
    for (size_t at = 0; at + 4 <= size;) {
        uint8_t const format = info[at];
        uint8_t const attribute = info[at + 1];
        if (format != kFORMAT_SIZED) {
            at += 4;
            continue;
        }
        auto const length = readAt<uint16_t>(info + at + 2);
        unsigned char const* const value = info + at + 4;
        if (attribute == kKPARAM_INFO) {
            sizes[readAt<uint16_t>(value + 4)] =
                readAt<uint32_t>(value + 8) >> kPARAMETER_SIZE_SHIFT;
        } else if (attribute == kREQNTID) {
            threads = readAt<uint32_t>(value);
        }
        at += 4U + length;
    }
    ImageKernel kernel{std::move(function), {}, threads};
    for (auto const& [ordinal, bytes] : sizes) {
        if (ordinal != kernel.parameterSizes.size()) {
            throw std::runtime_error("a parameter is missing in .nv.info");
        }
        kernel.parameterSizes.push_back(bytes);
    }
    return kernel;
}

Image readCubin(unsigned char const* data) {
    auto const header = readAt<Elf64_Ehdr>(data);
    if (header.e_machine != kMACHINE_CUDA) {
        throw std::runtime_error("an ELF file that is no cubin");
    }
    bool const isBlackwell = header.e_ident[EI_ABIVERSION] >= kABI_BLACKWELL;
    Image image{};
    image.sm =
        static_cast<int32_t>(isBlackwell ? (header.e_flags >> 8U) & 0xFFU : header.e_flags & 0xFFU);
    // From Blackwell on the mark is elsewhere; Triton compiles all kernels for these with it.
    image.isExact = isBlackwell || (header.e_flags & kACCELERATED) != 0;

    auto const section = [&](size_t index) {
        return readAt<Elf64_Shdr>(data + header.e_shoff + index * header.e_shentsize);
    };
    Elf64_Shdr const names = section(header.e_shstrndx);
    std::string const prefix = ".nv.info.";
    for (size_t i = 0; i < header.e_shnum; ++i) {
        Elf64_Shdr const candidate = section(i);
        std::string const name =
            reinterpret_cast<char const*>(data + names.sh_offset + candidate.sh_name);
        if (name.compare(0, prefix.size(), prefix) == 0) {
            image.kernels.push_back(readInfo(name.substr(prefix.size()), data + candidate.sh_offset,
                                             candidate.sh_size));
        }
    }
    return image;
}

Image readPtx(std::string const& text) {
    Image image{};
    image.isPtx = true;
    std::smatch target;
    std::smatch entry;
    std::smatch threads;
    if (!std::regex_search(text, target, std::regex{R"(\.target sm_(\d+)(a?))"}) ||
        !std::regex_search(text, entry, std::regex{R"(\.entry (\w+)\(([^)]*)\))"}) ||
        !std::regex_search(text, threads, std::regex{R"(\.reqntid (\d+))"})) {
        throw std::runtime_error("neither a cubin nor PTX");
    }
    image.sm = std::stoi(target[1]);
    image.isExact = target[2].length() != 0;
    ImageKernel kernel{entry[1], {}, static_cast<uint32_t>(std::stoul(threads[1]))};
    std::string const parameters = entry[2];
    std::regex const parameter{R"(\.param \.[ufb](\d+))"};
    for (std::sregex_iterator it{parameters.begin(), parameters.end(), parameter};
         it != std::sregex_iterator{}; ++it) {
        kernel.parameterSizes.push_back(std::stoul((*it)[1]) / 8);
    }
    image.kernels.push_back(kernel);
    return image;
}

}  // namespace

Image readImage(void const* data) {
    auto const* const bytes = static_cast<unsigned char const*>(data);
    if (std::equal(ELFMAG, ELFMAG + SELFMAG, bytes)) {
        return readCubin(bytes);
    }
    // libstdc++'s regex recurses per character: the head of the text is all that is searched.
    constexpr size_t kHEAD = 4096;
    std::string const text = static_cast<char const*>(data);
    return readPtx(text.substr(0, kHEAD));
}

}  // namespace fake
